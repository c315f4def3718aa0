// SPDX-License-Identifier: GPL-2.0
/*
 * A driver for QEMU's edu device (docs/specs/edu.rst), which computes factorials: write a number to the file
 * "factorial" in the device's directory in sysfs, and read the result there.
 */
#include <linux/completion.h>
#include <linux/interrupt.h>
#include <linux/module.h>
#include <linux/pci.h>

#define EDU_FACTORIAL 0x08
#define EDU_STATUS 0x20
#define EDU_STATUS_INTERRUPT 0x80 /* raise one when the factorial is computed */
#define EDU_INTERRUPT_STATUS 0x24
#define EDU_INTERRUPT_ACKNOWLEDGE 0x64

struct edu {
	void __iomem *registers;
	struct mutex lock;
	struct completion computed;
};

static irqreturn_t edu_interrupt(int irq, void *data)
{
	struct edu *edu = data;
	u32 status = readl(edu->registers + EDU_INTERRUPT_STATUS);

	writel(status, edu->registers + EDU_INTERRUPT_ACKNOWLEDGE);
	complete(&edu->computed);
	return IRQ_HANDLED;
}

static ssize_t factorial_store(struct device *dev, struct device_attribute *attribute, const char *text, size_t size)
{
	struct edu *edu = dev_get_drvdata(dev);
	unsigned int number;
	int error = kstrtouint(text, 0, &number);

	if (error)
		return error;
	mutex_lock(&edu->lock);
	reinit_completion(&edu->computed);
	writel(EDU_STATUS_INTERRUPT, edu->registers + EDU_STATUS);
	writel(number, edu->registers + EDU_FACTORIAL);
	if (!wait_for_completion_timeout(&edu->computed, HZ)) {
		dev_err(dev, "no interrupt for %u!, status %#x\n", number, readl(edu->registers + EDU_STATUS));
		error = -ETIMEDOUT;
	}
	mutex_unlock(&edu->lock);
	return error ?: size;
}

static ssize_t factorial_show(struct device *dev, struct device_attribute *attribute, char *text)
{
	struct edu *edu = dev_get_drvdata(dev);

	return sysfs_emit(text, "%u\n", readl(edu->registers + EDU_FACTORIAL));
}
static DEVICE_ATTR_RW(factorial);

static struct attribute *edu_attrs[] = { &dev_attr_factorial.attr, NULL };
ATTRIBUTE_GROUPS(edu);

static int edu_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct edu *edu;
	int error;

	edu = devm_kzalloc(&pdev->dev, sizeof(*edu), GFP_KERNEL);
	if (!edu)
		return -ENOMEM;
	mutex_init(&edu->lock);
	init_completion(&edu->computed);
	error = pcim_enable_device(pdev);
	if (error)
		return error;
	edu->registers = pcim_iomap(pdev, 0, 0);
	if (!edu->registers)
		return -ENOMEM;
	error = pci_alloc_irq_vectors(pdev, 1, 1, PCI_IRQ_MSI);
	if (error < 0)
		return error;
	pci_set_drvdata(pdev, edu);
	return devm_request_irq(&pdev->dev, pci_irq_vector(pdev, 0), edu_interrupt, 0, "factorial", edu);
}

static const struct pci_device_id edu_ids[] = {
	{ PCI_DEVICE(0x1234, 0x11e8) },
	{ }
};
MODULE_DEVICE_TABLE(pci, edu_ids);

static struct pci_driver edu_driver = {
	.name = "factorial",
	.id_table = edu_ids,
	.probe = edu_probe,
	.dev_groups = edu_groups,
};
module_pci_driver(edu_driver);

MODULE_DESCRIPTION("A driver for QEMU's edu device, with a bug to find");
MODULE_LICENSE("GPL");
