#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "test.h"

static struct {
	const char *name;
	void (*function)(void);
} tests[64];
static int count;

void test_register(const char *name, void (*function)(void))
{
	tests[count].name = name;
	tests[count++].function = function;
}

void check_failed(const char *file, int line, const char *condition, long long found, long long expected)
{
	fprintf(stderr, "%s:%d: %s: %lld, not %lld\n", file, line, condition, found, expected);
	exit(1);
}

int main(int argc, char **argv)
{
	int ran = 0;

	for (int i = 0; i < count; i++) {
		if (argc == 2 && !strcmp(argv[1], "--list"))
			puts(tests[i].name);
		if (argc == 2 && !strcmp(argv[1], tests[i].name)) {
			tests[i].function();
			ran++;
		}
	}
	return ran || (argc == 2 && !strcmp(argv[1], "--list")) ? 0 : 2;
}
