/* System calls and what else a program without a C library needs (x86-64; the numbers are the kernel's). */
#pragma once

#include <asm/unistd.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

static inline long system_call(long number, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}

/* Negative: the error, as the kernel returns it. */
#define call6(name, a, b, c, d, e, f) \
	system_call(__NR_##name, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))
#define call5(name, a, b, c, d, e) call6(name, a, b, c, d, e, 0) /* the sixth of mmap is an offset */
#define call4(name, a, b, c, d) call5(name, a, b, c, d, 0)
#define call3(name, a, b, c) call5(name, a, b, c, 0, 0)
#define call2(name, a, b) call5(name, a, b, 0, 0, 0)
#define call1(name, a) call5(name, a, 0, 0, 0, 0)
#define call0(name) call5(name, 0, 0, 0, 0, 0)

/* The compiler makes calls of these. */
void *memcpy(void *to, const void *from, size_t size);
void *memset(void *to, int byte, size_t size);

static inline size_t length(const char *text)
{
	size_t size = 0;

	while (text[size])
		size++;
	return size;
}
