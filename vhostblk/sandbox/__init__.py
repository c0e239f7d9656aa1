"""What a daemon that serves cannot do any more, whoever has taken it over: docs/security.md.

`sandbox` says what happens when; `privileges` drops capabilities (capabilities(7)), `files` is what may still be opened
(landlock(7)), `system_calls` what the kernel is still asked for (seccomp(2)), and `libraries` finds the packages that
do it. The kernel's interfaces are theirs, the policy is ours.

A sandbox is of a process, and for good: only whoever made the process may use this. Knows nothing of guests and
exports.
"""
