"""How many connections a process may have."""

from __future__ import annotations

ENOUGH = 1 << 20


def allow_many() -> int:
    """Raise the soft limit of open files to the hard one; the limit, 0 where there is none to be known.

    The usual soft limit of 1024 is reached with 500 requests under way: a connection on each side.
    """
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):
        return soft
    return wanted
