/* One function for each KVM ioctl: scalars in, -errno or the result out (Documentation/virt/kvm/api.rst). */
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <linux/kvm.h>

/* Newer than the headers of some supported systems. */
#ifndef KVM_EXIT_MEMORY_FAULT /* Linux 6.8 */
#define KVM_EXIT_MEMORY_FAULT 39
#endif
#ifndef KVM_DEV_VFIO_FILE /* Linux 6.6; the same numbers as the older KVM_DEV_VFIO_GROUP */
#define KVM_DEV_VFIO_FILE KVM_DEV_VFIO_GROUP
#define KVM_DEV_VFIO_FILE_ADD KVM_DEV_VFIO_GROUP_ADD
#define KVM_DEV_VFIO_FILE_DEL KVM_DEV_VFIO_GROUP_DEL
#endif

#define KVMPASS_MAX_CPUID 256
#define KVMPASS_MAX_MSRS 64
#define KVMPASS_MAX_ROUTES 4096 /* KVM_MAX_IRQ_ROUTES, include/linux/kvm_host.h */

struct kvmpass_route {
	uint32_t gsi;
	uint32_t type;
	uint32_t irqchip;
	uint32_t pin;
	uint64_t address;
	uint32_t data;
};

/* One exit, flat: kvm_run's anonymous unions cannot be declared to cffi. For KVM_EXIT_IO `address` is the port and
 * `data_offset` counts from the start of kvm_run, for KVM_EXIT_MMIO too. */
struct kvmpass_exit {
	uint32_t reason;
	uint8_t is_write;
	uint8_t size;
	uint32_t count;
	uint64_t address;
	uint64_t data_offset;
	uint64_t detail[2];
	uint64_t answered; /* exits that the fast path handled, since the vCPU's creation */
};

static int kvm_get_api_version(int kvm)
{
	return RESULT(ioctl(kvm, KVM_GET_API_VERSION, 0));
}

static int kvm_check_extension(int kvm_or_vm, int capability)
{
	return RESULT(ioctl(kvm_or_vm, KVM_CHECK_EXTENSION, capability));
}

static int kvm_create_vm(int kvm)
{
	return RESULT(ioctl(kvm, KVM_CREATE_VM, 0));
}

static int kvm_get_vcpu_mmap_size(int kvm)
{
	return RESULT(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
}

union kvmpass_cpuid {
	struct kvm_cpuid2 head;
	char space[sizeof(struct kvm_cpuid2) + KVMPASS_MAX_CPUID * sizeof(struct kvm_cpuid_entry2)];
};

static int kvm_get_supported_cpuid(int kvm, struct kvm_cpuid_entry2 *entries, unsigned int count)
{
	union kvmpass_cpuid cpuid = { .head = { .nent = KVMPASS_MAX_CPUID } };
	int result = RESULT(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid));

	if (result < 0)
		return result;
	if (cpuid.head.nent > count)
		return -E2BIG;
	memcpy(entries, cpuid.head.entries, cpuid.head.nent * sizeof(*entries));
	return (int)cpuid.head.nent;
}

static int kvm_set_user_memory_region(int vm, uint32_t slot, uint32_t flags, uint64_t gpa, uint64_t size,
                                      uint64_t hva)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot,
		.flags = flags,
		.guest_phys_addr = gpa,
		.memory_size = size,
		.userspace_addr = hva,
	};

	return RESULT(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region));
}

static int kvm_create_irqchip(int vm)
{
	return RESULT(ioctl(vm, KVM_CREATE_IRQCHIP, 0));
}

/* Of the PIC: `chip` is KVM_IRQCHIP_PIC_MASTER or _SLAVE. */
static int kvm_get_irqchip_pic(int vm, uint32_t chip, struct kvm_pic_state *pic)
{
	struct kvm_irqchip state = { .chip_id = chip };
	int result = RESULT(ioctl(vm, KVM_GET_IRQCHIP, &state));

	*pic = state.chip.pic;
	return result;
}

static int kvm_set_irqchip_pic(int vm, uint32_t chip, const struct kvm_pic_state *pic)
{
	struct kvm_irqchip state = { .chip_id = chip };

	state.chip.pic = *pic;
	return RESULT(ioctl(vm, KVM_SET_IRQCHIP, &state));
}

static int kvm_set_gsi_routing(int vm, const struct kvmpass_route *routes, unsigned int count)
{
	union {
		struct kvm_irq_routing head;
		char space[sizeof(struct kvm_irq_routing) + KVMPASS_MAX_ROUTES * sizeof(struct kvm_irq_routing_entry)];
	} table;

	if (count > KVMPASS_MAX_ROUTES)
		return -E2BIG;
	memset(&table, 0, sizeof(table.head) + count * sizeof(struct kvm_irq_routing_entry));
	table.head.nr = count;
	for (unsigned int i = 0; i < count; i++) {
		struct kvm_irq_routing_entry *entry = &table.head.entries[i];

		entry->gsi = routes[i].gsi;
		entry->type = routes[i].type;
		if (routes[i].type == KVM_IRQ_ROUTING_MSI) {
			entry->u.msi.address_lo = (uint32_t)routes[i].address;
			entry->u.msi.address_hi = (uint32_t)(routes[i].address >> 32);
			entry->u.msi.data = routes[i].data;
		} else {
			entry->u.irqchip.irqchip = routes[i].irqchip;
			entry->u.irqchip.pin = routes[i].pin;
		}
	}
	return RESULT(ioctl(vm, KVM_SET_GSI_ROUTING, &table));
}

static int kvm_irqfd(int vm, int eventfd, uint32_t gsi, uint32_t flags, int resamplefd)
{
	struct kvm_irqfd irqfd = {
		.fd = (uint32_t)eventfd,
		.gsi = gsi,
		.flags = flags,
		.resamplefd = (uint32_t)resamplefd,
	};

	return RESULT(ioctl(vm, KVM_IRQFD, &irqfd));
}

static int kvm_ioeventfd(int vm, int eventfd, uint64_t address, uint32_t size, uint32_t flags)
{
	struct kvm_ioeventfd ioeventfd = { .addr = address, .len = size, .fd = eventfd, .flags = flags };

	return RESULT(ioctl(vm, KVM_IOEVENTFD, &ioeventfd));
}

static int kvm_irq_line(int vm, uint32_t gsi, uint32_t level)
{
	struct kvm_irq_level line = { .irq = gsi, .level = level };

	return RESULT(ioctl(vm, KVM_IRQ_LINE, &line));
}

static int kvm_signal_msi(int vm, uint64_t address, uint32_t data)
{
	struct kvm_msi msi = {
		.address_lo = (uint32_t)address,
		.address_hi = (uint32_t)(address >> 32),
		.data = data,
	};

	return RESULT(ioctl(vm, KVM_SIGNAL_MSI, &msi));
}

static int kvm_register_coalesced_mmio(int vm, uint64_t address, uint32_t size, uint32_t pio)
{
	struct kvm_coalesced_mmio_zone zone = { .addr = address, .size = size, .pio = pio };

	return RESULT(ioctl(vm, KVM_REGISTER_COALESCED_MMIO, &zone));
}

static int kvm_unregister_coalesced_mmio(int vm, uint64_t address, uint32_t size, uint32_t pio)
{
	struct kvm_coalesced_mmio_zone zone = { .addr = address, .size = size, .pio = pio };

	return RESULT(ioctl(vm, KVM_UNREGISTER_COALESCED_MMIO, &zone));
}

static int kvm_create_vcpu(int vm, unsigned int id)
{
	return RESULT(ioctl(vm, KVM_CREATE_VCPU, (unsigned long)id));
}

static int kvm_create_device(int vm, uint32_t type)
{
	struct kvm_create_device device = { .type = type };
	int result = RESULT(ioctl(vm, KVM_CREATE_DEVICE, &device));

	return result < 0 ? result : (int)device.fd;
}

static int kvm_set_device_attr_file(int device, uint32_t group, uint64_t attr, int32_t file)
{
	struct kvm_device_attr request = { .group = group, .attr = attr, .addr = (uintptr_t)&file };

	return RESULT(ioctl(device, KVM_SET_DEVICE_ATTR, &request));
}

/* Whether the exit is an access that the fast path has handled. Writes that KVM has collected come before it. */
static int kvmpass_answered(struct kvm_run *run, struct kvmpass_fastpath *path)
{
	char *page = (char *)run + KVM_COALESCED_MMIO_PAGE_OFFSET * 4096;
	volatile struct kvm_coalesced_mmio_ring *ring = (struct kvm_coalesced_mmio_ring *)page;

	return run->exit_reason == KVM_EXIT_MMIO && ring->first == ring->last &&
	       kvmpass_fastpath_access(path, run->mmio.phys_addr, run->mmio.len, run->mmio.is_write, run->mmio.data);
}

/* Enter the guest until an exit that is not for the fast path, which may be NULL. A signal ends it in any case, as
 * immediate_exit is set before the signal is sent. */
static int kvm_run(int vcpu, uintptr_t address, struct kvmpass_exit *out, struct kvmpass_fastpath *path)
{
	struct kvm_run *run = (struct kvm_run *)address;
	int result;

	while (!(result = RESULT_ONCE(ioctl(vcpu, KVM_RUN, 0))) && path && kvmpass_answered(run, path))
		__atomic_store_n(&out->answered, out->answered + 1, __ATOMIC_RELAXED);

	/* KVM_EXIT_MEMORY_FAULT comes with an error and a filled kvm_run. */
	if (result < 0 && !((result == -EFAULT) && run->exit_reason == KVM_EXIT_MEMORY_FAULT))
		return result;
	memset(out, 0, offsetof(struct kvmpass_exit, answered)); /* other threads read that */
	out->reason = run->exit_reason;
	switch (run->exit_reason) {
	case KVM_EXIT_IO:
		out->is_write = run->io.direction == KVM_EXIT_IO_OUT;
		out->size = run->io.size;
		out->count = run->io.count;
		out->address = run->io.port;
		out->data_offset = run->io.data_offset;
		break;
	case KVM_EXIT_MMIO:
		out->is_write = run->mmio.is_write;
		out->size = (uint8_t)run->mmio.len;
		out->count = 1;
		out->address = run->mmio.phys_addr;
		out->data_offset = (uint64_t)((char *)run->mmio.data - (char *)run);
		break;
	case KVM_EXIT_FAIL_ENTRY:
		out->detail[0] = run->fail_entry.hardware_entry_failure_reason;
		out->detail[1] = run->fail_entry.cpu;
		break;
	case KVM_EXIT_INTERNAL_ERROR:
		out->detail[0] = run->internal.suberror;
		out->detail[1] = run->internal.ndata ? run->internal.data[0] : 0;
		break;
	case KVM_EXIT_SYSTEM_EVENT:
		out->detail[0] = run->system_event.type;
		break;
	case KVM_EXIT_MEMORY_FAULT: {
		/* struct { __u64 flags; __u64 gpa; __u64 size; } in the union that starts at `hw` */
		uint64_t fault[3];

		memcpy(fault, &run->hw, sizeof(fault));
		out->detail[0] = fault[0];
		out->address = fault[1];
		out->detail[1] = fault[2];
		break;
	}
	}
	return 0;
}

static void kvm_run_set_immediate_exit(uintptr_t address, int value)
{
	((volatile struct kvm_run *)address)->immediate_exit = (uint8_t)value;
}

static int kvm_set_cpuid2(int vcpu, const struct kvm_cpuid_entry2 *entries, unsigned int count)
{
	union kvmpass_cpuid cpuid = { .head = { .nent = count } };

	if (count > KVMPASS_MAX_CPUID)
		return -E2BIG;
	memcpy(cpuid.head.entries, entries, count * sizeof(*entries));
	return RESULT(ioctl(vcpu, KVM_SET_CPUID2, &cpuid));
}

static int kvm_get_regs(int vcpu, struct kvm_regs *regs)
{
	return RESULT(ioctl(vcpu, KVM_GET_REGS, regs));
}

static int kvm_set_regs(int vcpu, const struct kvm_regs *regs)
{
	return RESULT(ioctl(vcpu, KVM_SET_REGS, regs));
}

static int kvm_get_sregs(int vcpu, struct kvm_sregs *sregs)
{
	return RESULT(ioctl(vcpu, KVM_GET_SREGS, sregs));
}

static int kvm_set_sregs(int vcpu, const struct kvm_sregs *sregs)
{
	return RESULT(ioctl(vcpu, KVM_SET_SREGS, sregs));
}

union kvmpass_msrs {
	struct kvm_msrs head;
	char space[sizeof(struct kvm_msrs) + KVMPASS_MAX_MSRS * sizeof(struct kvm_msr_entry)];
};

/* Both return how many were read or written: fewer than `count` where KVM refuses the next one. */
static int kvm_get_msrs(int vcpu, struct kvm_msr_entry *entries, unsigned int count)
{
	union kvmpass_msrs msrs = { .head = { .nmsrs = count } };

	if (count > KVMPASS_MAX_MSRS)
		return -E2BIG;
	memcpy(msrs.head.entries, entries, count * sizeof(*entries));
	int result = RESULT(ioctl(vcpu, KVM_GET_MSRS, &msrs));

	memcpy(entries, msrs.head.entries, count * sizeof(*entries));
	return result;
}

static int kvm_set_msrs(int vcpu, const struct kvm_msr_entry *entries, unsigned int count)
{
	union kvmpass_msrs msrs = { .head = { .nmsrs = count } };

	if (count > KVMPASS_MAX_MSRS)
		return -E2BIG;
	memcpy(msrs.head.entries, entries, count * sizeof(*entries));
	return RESULT(ioctl(vcpu, KVM_SET_MSRS, &msrs));
}
