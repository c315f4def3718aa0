/* Texts, without a C library. */
#include "text.h"

#include "system.h"

void say(const char *text)
{
	call3(write, 2, text, length(text));
}

void say_number(unsigned int number)
{
	char digits[] = "0000000000";
	size_t at = sizeof(digits) - 1;

	do
		digits[--at] = '0' + number % 10;
	while (number /= 10);
	say(digits + at);
}

bool begins(const char *text, const char *with)
{
	while (*with)
		if (*text++ != *with++)
			return false;
	return true;
}

bool equal(const char *text, const char *other)
{
	return begins(text, other) && begins(other, text);
}

char *after(char *text, const char *part)
{
	for (; *text; text++)
		if (begins(text, part))
			return text + length(part);
	return NULL;
}
