// SPDX-License-Identifier: GPL-2.0
/*
 * A driver for QEMU's edu device (docs/specs/edu.rst) that can have a bug: fault=oops, loop or panic.
 */
#include <linux/devm-helpers.h>
#include <linux/module.h>
#include <linux/pci.h>

#define EDU_IDENTITY 0x00
#define EDU_LIVENESS 0x04 /* reads back inverted */
#define EDU_STATUS 0x20
#define EDU_NEVER 0x40 /* a bit of the status that is never set */

struct faulty {
	void __iomem *registers;
	spinlock_t lock;
	struct delayed_work work;
};

static char *fault = "none";
module_param(fault, charp, 0444);
MODULE_PARM_DESC(fault, "oops, loop: in probe; panic: a second after it");

/* Oops: the driver's data is used before it is set. */
static u32 faulty_status(struct pci_dev *pdev)
{
	struct faulty *faulty = pci_get_drvdata(pdev);

	return readl(faulty->registers + EDU_STATUS);
}

/* Loop: no limit to the wait, and nobody else gets the CPU. */
static void faulty_wait(struct faulty *faulty)
{
	spin_lock(&faulty->lock);
	while (!(readl(faulty->registers + EDU_STATUS) & EDU_NEVER))
		cpu_relax();
	spin_unlock(&faulty->lock);
}

/* Panic: when probe is long over. */
static void faulty_work(struct work_struct *work)
{
	panic("faulty: the device cannot be in this state\n");
}

static int faulty_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct faulty *faulty;
	int error;

	faulty = devm_kzalloc(&pdev->dev, sizeof(*faulty), GFP_KERNEL);
	if (!faulty)
		return -ENOMEM;
	spin_lock_init(&faulty->lock);
	error = pcim_enable_device(pdev);
	if (error)
		return error;
	faulty->registers = pcim_iomap(pdev, 0, 0);
	if (!faulty->registers)
		return -ENOMEM;
	writel(0x12345678, faulty->registers + EDU_LIVENESS);
	if (readl(faulty->registers + EDU_LIVENESS) != ~0x12345678)
		return dev_err_probe(&pdev->dev, -EIO, "the device is not alive\n");
	error = devm_delayed_work_autocancel(&pdev->dev, &faulty->work, faulty_work);
	if (error)
		return error;

	if (!strcmp(fault, "oops"))
		faulty_status(pdev);
	if (!strcmp(fault, "loop"))
		faulty_wait(faulty);
	if (!strcmp(fault, "panic"))
		schedule_delayed_work(&faulty->work, HZ);

	pci_set_drvdata(pdev, faulty);
	dev_info(&pdev->dev, "edu %#x is alive\n", readl(faulty->registers + EDU_IDENTITY));
	return 0;
}

static const struct pci_device_id faulty_ids[] = {
	{ PCI_DEVICE(0x1234, 0x11e8) },
	{ }
};
MODULE_DEVICE_TABLE(pci, faulty_ids);

static struct pci_driver faulty_driver = {
	.name = "faulty",
	.id_table = faulty_ids,
	.probe = faulty_probe,
};
module_pci_driver(faulty_driver);

MODULE_DESCRIPTION("A driver for QEMU's edu device, with a bug on demand");
MODULE_LICENSE("GPL");
