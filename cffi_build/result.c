/* What every system call of this layer returns: its result, or -errno.
 *
 * RESULT repeats a call that a signal interrupted. The kernel undoes such a call before it returns EINTR:
 * KVM_CREATE_VM (mm_take_all_locks, mm/mmap.c) is one that any signal interrupts; others are documented to return
 * EINTR, or do so only to a process that is being killed, which never sees it.
 *
 * RESULT_ONCE is for the calls that must not be repeated:
 *   KVM_RUN  a signal is how a thread is taken out of the guest (immediate_exit, Documentation/virt/kvm/api.rst)
 */
#include <errno.h>

#define RESULT(call) ({ long _result; do _result = (call); while (_result < 0 && errno == EINTR); \
                        (int)(_result < 0 ? -errno : _result); })
#define RESULT_ONCE(call) ({ int _result = (call); _result < 0 ? -errno : _result; })
