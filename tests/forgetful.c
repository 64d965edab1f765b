/* A preloaded disk with a memory of its own: what was not fsynced can be forgotten, writes can fail, processes die.
 *
 * FORGETFUL_ROOT    the directory that is watched
 * FORGETFUL_SHADOW  where the state of every fsync is kept: file-KEY (content), dir-KEY ("KEY name" lines)
 * FORGETFUL_FAIL    a file; while it exists, writing below the root fails with the errno that it holds
 * FORGETFUL_KILL    SIGKILL at the n-th write, fsync, rename, mkdir, unlink or created file below the root
 *
 * KEY is inode and birth time: an inode number that is used again is another file. tests/power.py reads the shadow.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name, ...) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))(__VA_ARGS__)

static int below_root(const char *path) {
    const char *root = getenv("FORGETFUL_ROOT");
    if (!root || !path) return 0;
    size_t n = strlen(root);
    return strncmp(path, root, n) == 0 && (path[n] == '/' || path[n] == 0);
}

static int path_of(int fd, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, out, PATH_MAX - 1);
    out[n < 0 ? 0 : n] = 0;
    return n > 0;
}

static int at_path(int dirfd, const char *name, char *out) {
    char base[PATH_MAX];
    if (name[0] == '/' || dirfd == AT_FDCWD) return snprintf(out, PATH_MAX, "%s", name) > 0;
    return path_of(dirfd, base) && snprintf(out, PATH_MAX, "%s/%s", base, name) > 0;
}

/* One operation below the root: dies at the appointed one; an errno where the disk refuses, else 0. */
static int operation(const char *path) {
    static long count;
    if (!below_root(path)) return 0;
    const char *kill_at = getenv("FORGETFUL_KILL"), *fail = getenv("FORGETFUL_FAIL");
    if (kill_at && __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST) == atol(kill_at)) kill(getpid(), SIGKILL);
    if (!fail) return 0;
    int fd = REAL(open, fail, O_RDONLY), code = 0;
    char text[16] = "";
    if (fd >= 0) {
        if (read(fd, text, sizeof text - 1) > 0) code = atoi(text);
        close(fd);
    }
    return code;
}

static int operation_on(int fd) {
    char path[PATH_MAX];
    return getenv("FORGETFUL_ROOT") && path_of(fd, path) ? operation(path) : 0;
}

static void key_of(int dirfd, const char *name, char *out, size_t n) {
    struct statx s;
    if (statx(dirfd, name, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW, STATX_INO | STATX_BTIME, &s)) s.stx_ino = 0;
    snprintf(out, n, "%llu-%lld.%09u", (unsigned long long)s.stx_ino, (long long)s.stx_btime.tv_sec, s.stx_btime.tv_nsec);
}

static void list_directory(int from, int to) {
    DIR *dir = fdopendir(openat(from, ".", O_RDONLY | O_DIRECTORY));
    if (!dir) return;
    for (struct dirent *e; (e = readdir(dir));) {
        char key[80], line[NAME_MAX + 96];
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
        key_of(from, e->d_name, key, sizeof key);
        int n = snprintf(line, sizeof line, "%s %s\n", key, e->d_name);
        if (REAL(write, to, line, n) != n) abort();
    }
    closedir(dir);
}

static void copy_file(const char *path, int to) {
    char block[1 << 16];
    int from = REAL(open, path, O_RDONLY);
    for (ssize_t n; from >= 0 && (n = read(from, block, sizeof block)) > 0;)
        if (REAL(write, to, block, n) != n) abort();
    if (from >= 0) close(from);
}

/* Keep what `fd` holds now, whole or not at all. */
static void remember(int fd) {
    char path[PATH_MAX], key[80], temporary[PATH_MAX], final[PATH_MAX + 64];
    struct stat s;
    if (!getenv("FORGETFUL_SHADOW") || !path_of(fd, path) || !below_root(path) || fstat(fd, &s)) return;
    key_of(fd, "", key, sizeof key);
    const char *shadow = getenv("FORGETFUL_SHADOW");
    snprintf(temporary, sizeof temporary, "%s/.%d.%d", shadow, getpid(), fd);
    snprintf(final, sizeof final, "%s/%s-%s", shadow, S_ISDIR(s.st_mode) ? "dir" : "file", key);
    int to = REAL(open, temporary, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (to < 0) abort();
    if (S_ISDIR(s.st_mode))
        list_directory(fd, to);
    else
        copy_file(path, to);
    close(to);
    if (REAL(rename, temporary, final)) abort();
}

#define REFUSE(code, result)  \
    do {                      \
        int refused = (code); \
        if (refused) {        \
            errno = refused;  \
            return result;    \
        }                     \
    } while (0)

static int flush_to_disk(int fd) {
    REFUSE(operation_on(fd), -1);
    remember(fd);
    return 0;
}

int fsync(int fd) { return flush_to_disk(fd); }
int fdatasync(int fd) { return flush_to_disk(fd); }

ssize_t write(int fd, const void *data, size_t n) {
    REFUSE(operation_on(fd), -1);
    return REAL(write, fd, data, n);
}

ssize_t writev(int fd, const struct iovec *parts, int n) {
    REFUSE(operation_on(fd), -1);
    return REAL(writev, fd, parts, n);
}

int rename(const char *from, const char *to) {
    REFUSE(operation(to), -1);
    return REAL(rename, from, to);
}

int mkdir(const char *path, mode_t mode) {
    REFUSE(operation(path), -1);
    return REAL(mkdir, path, mode);
}

int unlink(const char *path) {
    REFUSE(operation(path), -1);
    return REAL(unlink, path);
}

int unlinkat(int dirfd, const char *name, int flags) {
    char path[PATH_MAX];
    if (at_path(dirfd, name, path)) REFUSE(operation(path), -1);
    return REAL(unlinkat, dirfd, name, flags);
}

#define OPENS(name)                                                                      \
    int name(const char *path, int flags, ...) {                                         \
        va_list rest;                                                                    \
        va_start(rest, flags);                                                           \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? (mode_t)va_arg(rest, unsigned) : 0; \
        va_end(rest);                                                                    \
        if (flags & O_CREAT) REFUSE(operation(path), -1);                                \
        return REAL(name, path, flags, mode);                                            \
    }
OPENS(open)
OPENS(open64)
