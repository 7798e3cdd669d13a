/* Stops a process at the nth thing that it does to files below some folders, as a kill at that moment would.

   Loaded with LD_PRELOAD, so that writes of Python, torch and the Rust of safetensors all come by. A write is stopped
   in its middle: half of it is done. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define STOPPED 137
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static char below[PATH_MAX];
static long at = -1, seen = 0;

/* From now on count what happens below a folder; stop at the nth, from 0, or never where it is negative. */
void faults_arm(const char *folder, long nth)
{
    snprintf(below, sizeof below, "%s", folder);
    at = nth;
    seen = 0;
}

long faults_seen(void) { return seen; }

static int is_below(const char *path) { return below[0] && !strncmp(path, below, strlen(below)); }

static int ours(int folder, const char *path)
{
    char whole[2 * PATH_MAX], link[64], start[PATH_MAX];
    if (!below[0] || !path)
        return 0;
    if (path[0] == '/')
        return is_below(path);
    if (folder == AT_FDCWD)
        snprintf(link, sizeof link, "/proc/self/cwd");
    else
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t size = readlink(link, start, sizeof start - 1);
    if (size < 0)
        return 0;
    start[size] = 0;
    snprintf(whole, sizeof whole, "%s/%s", start, path);
    return is_below(whole);
}

static int ours_open(int fd)
{
    char link[64], path[PATH_MAX];
    if (!below[0])
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0)
        return 0;
    path[size] = 0;
    return is_below(path);
}

static int now(void) { return seen++ == at; }

static void pass(int counts)
{
    if (counts && now())
        _exit(STOPPED);
}

#define OPENED(name)                                                                                                   \
    int name(const char *path, int flags, ...)                                                                         \
    {                                                                                                                  \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;                                                      \
        va_end(rest);                                                                                                  \
        pass((flags & (O_CREAT | O_TRUNC)) && ours(AT_FDCWD, path));                                                   \
        return REAL(name)(path, flags, mode);                                                                          \
    }
OPENED(open)
OPENED(open64)

#define OPENED_AT(name)                                                                                                \
    int name(int folder, const char *path, int flags, ...)                                                             \
    {                                                                                                                  \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;                                                      \
        va_end(rest);                                                                                                  \
        pass((flags & (O_CREAT | O_TRUNC)) && ours(folder, path));                                                     \
        return REAL(name)(folder, path, flags, mode);                                                                  \
    }
OPENED_AT(openat)
OPENED_AT(openat64)

#define STREAM(name)                                                                                                   \
    FILE *name(const char *path, const char *mode)                                                                     \
    {                                                                                                                  \
        pass(mode[0] != 'r' && ours(AT_FDCWD, path));                                                                  \
        return REAL(name)(path, mode);                                                                                 \
    }
STREAM(fopen)
STREAM(fopen64)

#define WRITTEN(name, half, parameters, ...)                                                                           \
    ssize_t name parameters                                                                                            \
    {                                                                                                                  \
        if (ours_open(fd) && now()) {                                                                                  \
            half;                                                                                                      \
            _exit(STOPPED);                                                                                            \
        }                                                                                                              \
        return REAL(name)(__VA_ARGS__);                                                                                \
    }
WRITTEN(write, if (REAL(write)(fd, data, size / 2)) {}, (int fd, const void *data, size_t size), fd, data, size)
WRITTEN(pwrite, if (REAL(pwrite)(fd, data, size / 2, to)) {}, (int fd, const void *data, size_t size, off_t to), fd,
        data, size, to)
WRITTEN(pwrite64, if (REAL(pwrite64)(fd, data, size / 2, to)) {}, (int fd, const void *data, size_t size, off64_t to),
        fd, data, size, to)
WRITTEN(writev, if (REAL(writev)(fd, parts, count / 2)) {}, (int fd, const struct iovec *parts, int count), fd, parts,
        count)
WRITTEN(sendfile, if (REAL(sendfile)(fd, from, place, size / 2)) {}, (int fd, int from, off_t *place, size_t size), fd,
        from, place, size)
WRITTEN(sendfile64, if (REAL(sendfile64)(fd, from, place, size / 2)) {},
        (int fd, int from, off64_t *place, size_t size), fd, from, place, size)

#define ON_PATH(name, parameters, folder, path, ...)                                                                   \
    int name parameters                                                                                                \
    {                                                                                                                  \
        pass(ours(folder, path));                                                                                      \
        return REAL(name)(__VA_ARGS__);                                                                                \
    }
ON_PATH(rename, (const char *from, const char *to), AT_FDCWD, to, from, to)
ON_PATH(renameat, (int a, const char *from, int b, const char *to), b, to, a, from, b, to)
ON_PATH(unlink, (const char *path), AT_FDCWD, path, path)
ON_PATH(unlinkat, (int folder, const char *path, int flags), folder, path, folder, path, flags)
ON_PATH(rmdir, (const char *path), AT_FDCWD, path, path)
ON_PATH(mkdir, (const char *path, mode_t mode), AT_FDCWD, path, path, mode)
ON_PATH(mkdirat, (int folder, const char *path, mode_t mode), folder, path, folder, path, mode)

#define ON_OPEN(name, parameters, ...)                                                                                 \
    int name parameters                                                                                                \
    {                                                                                                                  \
        pass(ours_open(fd));                                                                                           \
        return REAL(name)(__VA_ARGS__);                                                                                \
    }
ON_OPEN(fsync, (int fd), fd)
ON_OPEN(fdatasync, (int fd), fd)
ON_OPEN(ftruncate, (int fd, off_t size), fd, size)
ON_OPEN(ftruncate64, (int fd, off64_t size), fd, size)
