/* Texts: print and compare them. */
#pragma once

#include <stdbool.h>

void say(const char *text); /* on standard error */
void say_number(unsigned int number);
bool begins(const char *text, const char *with);
bool equal(const char *text, const char *other);
char *after(char *text, const char *part); /* what follows the first part like this; NULL: there is none */
