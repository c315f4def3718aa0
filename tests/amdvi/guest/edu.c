/*
 * Drives QEMU's edu device (docs/specs/edu.rst) from a guest, through the guest's own VFIO without an IOMMU
 * (Documentation/driver-api/vfio.rst): edu GROUP BDF msix|msi|intx COUNT. MSI-X has only tests/support/emulated_edu.py.
 *
 * Raises COUNT interrupts, each only after the one before was seen and acknowledged, then copies through the device's
 * buffer by DMA. Exits with 0 if every interrupt came, none is left and the bytes are the same.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/vfio.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define IDENTITY 0x010000edu
#define DMA_DONE 0x100u /* in the interrupt status: QEMU's hw/misc/edu.c, DMA_IRQ */
#define WAIT_MS 20000
#define SIZE 2048 /* a DMA of a whole page ends QEMU 7.2 */

enum { ID = 0x00, STATUS = 0x24, RAISE = 0x60, ACKNOWLEDGE = 0x64, SOURCE = 0x80, TARGET = 0x88, COUNT = 0x90,
       COMMAND = 0x98, BUFFER = 0x40000 };
enum { START = 1, FROM_DEVICE = 2, INTERRUPT = 4 };

static int device, event, level_triggered, irq_index = VFIO_PCI_MSI_IRQ_INDEX;
static volatile uint8_t *bar;

static void fail(const char *what)
{
	printf("%s: %s\n", what, errno ? strerror(errno) : "no");
	exit(1);
}

#define CHECK(condition) do { errno = 0; if (!(condition)) fail(#condition); } while (0)

static uint32_t get(unsigned at)
{
	return *(volatile uint32_t *)(bar + at);
}

static void set(unsigned at, uint32_t value)
{
	*(volatile uint32_t *)(bar + at) = value;
}

static void open_device(const char *group_path, const char *bdf)
{
	struct vfio_region_info config = { .argsz = sizeof(config), .index = VFIO_PCI_CONFIG_REGION_INDEX };
	struct vfio_region_info bar0 = { .argsz = sizeof(bar0), .index = VFIO_PCI_BAR0_REGION_INDEX };
	uint16_t command;
	int container, group;

	CHECK((container = open("/dev/vfio/vfio", O_RDWR)) >= 0);
	CHECK((group = open(group_path, O_RDWR)) >= 0);
	CHECK(ioctl(group, VFIO_GROUP_SET_CONTAINER, &container) == 0);
	CHECK(ioctl(container, VFIO_SET_IOMMU, VFIO_NOIOMMU_IOMMU) == 0);
	CHECK((device = ioctl(group, VFIO_GROUP_GET_DEVICE_FD, bdf)) >= 0);
	CHECK(ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &config) == 0);
	CHECK(ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &bar0) == 0);
	CHECK(pread(device, &command, 2, config.offset + 4) == 2);
	command |= 2 | 4; /* memory decoding, bus mastering */
	CHECK(pwrite(device, &command, 2, config.offset + 4) == 2);
	bar = mmap(NULL, bar0.size, PROT_READ | PROT_WRITE, MAP_SHARED, device, bar0.offset);
	CHECK(bar != MAP_FAILED);
	CHECK(get(ID) == IDENTITY);
}

static void set_irqs(uint32_t flags, const void *data, size_t size)
{
	struct { struct vfio_irq_set set; int32_t fd; } irqs = { .set = {
		.argsz = sizeof(irqs.set) + size, .flags = flags, .count = 1,
		.index = irq_index,
	} };

	if (size)
		memcpy(&irqs.fd, data, size);
	CHECK(ioctl(device, VFIO_DEVICE_SET_IRQS, &irqs) == 0);
}

static void await(uint32_t status)
{
	struct pollfd ready = { .fd = event, .events = POLLIN };
	uint64_t count;

	errno = 0;
	if (poll(&ready, 1, WAIT_MS) != 1)
		fail("the interrupt came");
	CHECK(read(event, &count, sizeof(count)) == sizeof(count));
	CHECK(get(STATUS) == status);
	set(ACKNOWLEDGE, status);
	if (level_triggered) /* VFIO masked it when it came */
		set_irqs(VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_UNMASK, NULL, 0);
}

/* The guest-physical address, Documentation/admin-guide/mm/pagemap.rst. */
static uint64_t physical(const void *page)
{
	uint64_t entry;
	int pagemap;

	CHECK((pagemap = open("/proc/self/pagemap", O_RDONLY)) >= 0);
	CHECK(pread(pagemap, &entry, 8, (uintptr_t)page / 4096 * 8) == 8);
	CHECK(entry >> 63);
	close(pagemap);
	return (entry & ((1ull << 55) - 1)) * 4096;
}

static void transfer(uint64_t source, uint64_t target, uint32_t direction)
{
	*(volatile uint64_t *)(bar + SOURCE) = source;
	*(volatile uint64_t *)(bar + TARGET) = target;
	*(volatile uint64_t *)(bar + COUNT) = SIZE;
	*(volatile uint64_t *)(bar + COMMAND) = START | INTERRUPT | direction;
	await(DMA_DONE);
}

static void copy(void)
{
	uint8_t *pages = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	int i;

	CHECK(pages != MAP_FAILED && mlock(pages, 8192) == 0);
	for (i = 0; i < SIZE; i++)
		pages[i] = (uint8_t)(i * 37 + i / 256 + 1);
	transfer(physical(pages), BUFFER, 0);
	transfer(BUFFER, physical(pages + 4096), FROM_DEVICE);
	CHECK(memcmp(pages, pages + 4096, SIZE) == 0);
	CHECK(pages[4096 + SIZE] == 0);
	printf("dma %d bytes\n", SIZE);
}

static void show_interrupts(void)
{
	char line[512];
	FILE *interrupts = fopen("/proc/interrupts", "r");

	CHECK(interrupts);
	while (fgets(line, sizeof(line), interrupts))
		if (strstr(line, "vfio"))
			printf("after %s", line);
	fclose(interrupts);
}

int main(int argc, char **argv)
{
	long count, i;

	if (argc != 5)
		return 2;
	level_triggered = !strcmp(argv[3], "intx");
	if (level_triggered)
		irq_index = VFIO_PCI_INTX_IRQ_INDEX;
	else if (!strcmp(argv[3], "msix"))
		irq_index = VFIO_PCI_MSIX_IRQ_INDEX;
	count = atol(argv[4]);
	open_device(argv[1], argv[2]);
	CHECK(get(STATUS) == 0);
	CHECK((event = eventfd(0, 0)) >= 0);
	set_irqs(VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER, &event, sizeof(int32_t));
	for (i = 0; i < count; i++) {
		set(RAISE, 1);
		await(1);
	}
	printf("raised %ld\n", i);
	copy();
	show_interrupts();
	CHECK(get(STATUS) == 0);
	return 0;
}
