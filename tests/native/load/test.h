/* TEST(name) registers a test, CHECK ends it; `main` runs those named on its command line, `--list` names them. */
#pragma once
#include <stdint.h>

#define CHECK(condition) ((condition) ? (void)0 : check_failed(__FILE__, __LINE__, #condition, 0, 1))
#define CHECK_EQUAL(a, b)                                                                                              \
	do {                                                                                                           \
		long long left_ = (long long)(a), right_ = (long long)(b);                                             \
		if (left_ != right_)                                                                                   \
			check_failed(__FILE__, __LINE__, #a " == " #b, left_, right_);                                 \
	} while (0)

void check_failed(const char *file, int line, const char *condition, long long found, long long expected)
	__attribute__((noreturn));
void test_register(const char *name, void (*function)(void));

#define TEST(name)                                                                                                     \
	static void test_##name(void);                                                                                 \
	__attribute__((constructor)) static void register_##name(void)                                                 \
	{                                                                                                              \
		test_register(#name, test_##name);                                                                     \
	}                                                                                                              \
	static void test_##name(void)
