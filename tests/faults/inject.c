/* Preloaded into a process: makes its n-th mutating system call fail, or kills the process there; sets its clock back.
   `inject.py` builds it and arms it. Only calls on files below one folder count, in the order in which they are made. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { OPEN = 1, WRITE = 2, SYNC = 4, RENAME = 8, MKDIR = 16, REMOVE = 32, CUT = 64, LINK = 128, MODE = 256, READ = 512 };
enum { OFF, COUNT, FAIL, FAIL_ON, KILL_BEFORE, KILL_AFTER, TEAR, SIGNAL };
enum { GO = 0, REFUSE = -1, DIE = 2, HALF = 3 };

static volatile int mode = OFF;
static long target, count;
static int number;  /* errno, or the signal */
static unsigned kinds;
static char folder[1024];
static size_t length;
static int record = -1;
static long clock_shift;

static void say(const char *word, long n, const char *call, const char *path) {
    char line[2400];
    int size = snprintf(line, sizeof line, "%s %ld %s %s\n", word, n, call, path);
    if (record >= 0) syscall(SYS_write, record, line, size);
}

void fault_arm(int how, long n, int what, unsigned which, const char *below, const char *into) {
    strncpy(folder, below, sizeof folder - 1);
    length = strlen(folder);
    target = n; number = what; kinds = which; count = 0;
    int opened = syscall(SYS_openat, AT_FDCWD, into, O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC, 0644);
    record = fcntl(opened, F_DUPFD_CLOEXEC, 500);  /* out of the way of what the program counts on */
    if (record < 0) record = opened; else syscall(SYS_close, opened);
    mode = how;
}

void fault_clock(long seconds) { clock_shift = seconds; }

static void die(void) { for (;;) { syscall(SYS_kill, syscall(SYS_getpid), SIGKILL); pause(); } }

static int below(const char *path) { return !strncmp(path, folder, length) && (path[length] == '/' || !path[length]); }

/* The path of a name in an open folder, or of an open file (name NULL); returns whether it is below the folder. */
static int locate(int at, const char *name, char *out) {
    char link[64];
    ssize_t size = 0;
    if (!name || name[0] != '/') {
        if (at == AT_FDCWD) strcpy(link, "/proc/self/cwd"); else snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        size = syscall(SYS_readlinkat, AT_FDCWD, link, out, 1000);
        if (size <= 0) return 0;
        out[size] = 0;
        if (name) snprintf(out + size, 1000, "/%s", name);
    } else snprintf(out, 2000, "%s", name);
    return below(out);
}

static int reached(unsigned kind, const char *call, int at, const char *name) {
    char path[2048];
    if (mode == OFF || !(kind & kinds) || !locate(at, name, path)) return GO;
    long n = __sync_add_and_fetch(&count, 1);
    if (mode == COUNT || (mode == SIGNAL && n > target)) { say("call", n, call, path); return GO; }
    if (n != target && !(mode == FAIL_ON && n > target)) return GO;
    say("hit", n, call, path);
    switch (mode) {
        case FAIL: case FAIL_ON: errno = number; return REFUSE;
        case KILL_BEFORE: die(); return GO;
        case KILL_AFTER: return DIE;
        case TEAR: return HALF;
        default: syscall(SYS_kill, syscall(SYS_getpid), number); return GO;
    }
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = dlsym(RTLD_NEXT, #name)
/* A wrapper of a call: KIND and place of the file, then the call itself. */
#define WRAP(type, name, parameters, kind, at, path, arguments) \
    type name parameters { \
        REAL(name); \
        int fate = reached(kind, #name, at, path); \
        if (fate == REFUSE) return -1; \
        type result = real arguments; \
        if (fate >= DIE) die(); \
        return result; \
    }
#define WRAP_WRITE(type, name, parameters, fd, arguments) \
    type name parameters { \
        REAL(name); \
        int fate = reached(WRITE, #name, fd, NULL); \
        if (fate == REFUSE) return -1; \
        if (fate == HALF) size /= 2; \
        type result = real arguments; \
        if (fate >= DIE) die(); \
        return result; \
    }
#define WRAP_OPEN(name, first, at, arguments) \
    int name(first const char *path, int flags, ...) { \
        REAL(name); \
        mode_t bits = 0; \
        if (flags & (O_CREAT | __O_TMPFILE)) { va_list rest; va_start(rest, flags); bits = va_arg(rest, mode_t); va_end(rest); } \
        int writes = flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC); \
        int fate = reached(writes ? OPEN : READ, #name, at, path); \
        if (fate == REFUSE) return -1; \
        int result = real arguments; \
        if (fate >= DIE) die(); \
        return result; \
    }
#define FIRST_AT int at,

WRAP_OPEN(open, , AT_FDCWD, (path, flags, bits))
WRAP_OPEN(open64, , AT_FDCWD, (path, flags, bits))
WRAP_OPEN(openat, FIRST_AT, at, (at, path, flags, bits))
WRAP_OPEN(openat64, FIRST_AT, at, (at, path, flags, bits))
WRAP_WRITE(ssize_t, write, (int fd, const void *data, size_t size), fd, (fd, data, size))
WRAP_WRITE(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t to), fd, (fd, data, size, to))
WRAP_WRITE(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t to), fd, (fd, data, size, to))
WRAP_WRITE(ssize_t, sendfile, (int fd, int from, off_t *at, size_t size), fd, (fd, from, at, size))
WRAP_WRITE(ssize_t, sendfile64, (int fd, int from, off64_t *at, size_t size), fd, (fd, from, at, size))
WRAP_WRITE(ssize_t, copy_file_range, (int from, off64_t *a, int fd, off64_t *b, size_t size, unsigned flags), fd,
           (from, a, fd, b, size, flags))
WRAP(ssize_t, writev, (int fd, const struct iovec *parts, int n), WRITE, fd, NULL, (fd, parts, n))
WRAP(ssize_t, read, (int fd, void *data, size_t size), READ, fd, NULL, (fd, data, size))
WRAP(ssize_t, pread, (int fd, void *data, size_t size, off_t from), READ, fd, NULL, (fd, data, size, from))
WRAP(ssize_t, pread64, (int fd, void *data, size_t size, off64_t from), READ, fd, NULL, (fd, data, size, from))
WRAP(int, fsync, (int fd), SYNC, fd, NULL, (fd))
WRAP(int, fdatasync, (int fd), SYNC, fd, NULL, (fd))
WRAP(int, ftruncate, (int fd, off_t size), CUT, fd, NULL, (fd, size))
WRAP(int, ftruncate64, (int fd, off64_t size), CUT, fd, NULL, (fd, size))
WRAP(int, truncate, (const char *path, off_t size), CUT, AT_FDCWD, path, (path, size))
WRAP(int, rename, (const char *old, const char *new), RENAME, AT_FDCWD, new, (old, new))
WRAP(int, renameat, (int a, const char *old, int b, const char *new), RENAME, b, new, (a, old, b, new))
WRAP(int, renameat2, (int a, const char *old, int b, const char *new, unsigned flags), RENAME, b, new,
     (a, old, b, new, flags))
WRAP(int, mkdir, (const char *path, mode_t bits), MKDIR, AT_FDCWD, path, (path, bits))
WRAP(int, mkdirat, (int at, const char *path, mode_t bits), MKDIR, at, path, (at, path, bits))
WRAP(int, unlink, (const char *path), REMOVE, AT_FDCWD, path, (path))
WRAP(int, unlinkat, (int at, const char *path, int flags), REMOVE, at, path, (at, path, flags))
WRAP(int, rmdir, (const char *path), REMOVE, AT_FDCWD, path, (path))
WRAP(int, link, (const char *old, const char *new), LINK, AT_FDCWD, new, (old, new))
WRAP(int, linkat, (int a, const char *old, int b, const char *new, int flags), LINK, b, new, (a, old, b, new, flags))
WRAP(int, symlink, (const char *old, const char *new), LINK, AT_FDCWD, new, (old, new))
WRAP(int, symlinkat, (const char *old, int at, const char *new), LINK, at, new, (old, at, new))
WRAP(int, chmod, (const char *path, mode_t bits), MODE, AT_FDCWD, path, (path, bits))
WRAP(int, fchmod, (int fd, mode_t bits), MODE, fd, NULL, (fd, bits))
WRAP(int, fchmodat, (int at, const char *path, mode_t bits, int flags), MODE, at, path, (at, path, bits, flags))

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(clock_gettime);
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += clock_shift;
    return result;
}
time_t time(time_t *now) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    if (now) *now = t.tv_sec;
    return t.tv_sec;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    now->tv_sec = t.tv_sec;
    now->tv_usec = t.tv_nsec / 1000;
    return 0;
}
