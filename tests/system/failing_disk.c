/* LD_PRELOAD: after FAIL_AFTER writes or syncs of files whose name holds FAIL_FILE, FAIL_CALL fails with FAIL_ERRNO. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static int due(int fd, const char *call) {
    static long left = -1;
    char link[64], path[4096];
    const char *wanted = getenv("FAIL_CALL"), *file = getenv("FAIL_FILE");
    ssize_t length;
    if (wanted == NULL || file == NULL || strcmp(wanted, call) != 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if ((length = readlink(link, path, sizeof path - 1)) < 0) return 0;
    path[length] = 0;
    if (strstr(path, file) == NULL) return 0;
    if (left < 0) left = atol(getenv("FAIL_AFTER"));
    if (left > 0) { left--; return 0; }
    errno = atoi(getenv("FAIL_ERRNO"));
    return 1;
}

int fsync(int fd) {
    static int (*real)(int);
    if (!real) real = (int (*)(int)) dlsym(RTLD_NEXT, "fsync");
    return due(fd, "sync") ? -1 : real(fd);
}

int fdatasync(int fd) {
    static int (*real)(int);
    if (!real) real = (int (*)(int)) dlsym(RTLD_NEXT, "fdatasync");
    return due(fd, "sync") ? -1 : real(fd);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    static ssize_t (*real)(int, const void *, size_t, off64_t);
    if (!real) real = (ssize_t (*)(int, const void *, size_t, off64_t)) dlsym(RTLD_NEXT, "pwrite64");
    return due(fd, "write") ? -1 : real(fd, data, size, at);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { return pwrite64(fd, data, size, at); }

ssize_t write(int fd, const void *data, size_t size) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = (ssize_t (*)(int, const void *, size_t)) dlsym(RTLD_NEXT, "write");
    return due(fd, "write") ? -1 : real(fd, data, size);
}
