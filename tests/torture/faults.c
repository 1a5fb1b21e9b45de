/* Loaded before the C library (LD_PRELOAD): counts what a process does to files below one folder, and at one of these calls kills
 * it or fails as a disk would.
 *
 *     FAULTS_BELOW   the folder (an absolute path)
 *     FAULTS_AT      which call, counted from 1; 0: none
 *     FAULTS_DO      kill, or the number of an error
 *     FAULTS_ON      letters of the calls that count: w(rite) s(ync) r(ename) t(runcate, allocate) u(nlink, rmdir) m(kdir)
 *     FAULTS_LOG     file that a line is added to for every call that counts: what it was
 *
 * With FAULTS_AGAIN every call from that one on fails, as on a disk that stays full.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long count;

static int below(const char* path) {
    const char* folder = getenv("FAULTS_BELOW");
    char whole[PATH_MAX];
    if (folder == NULL || path == NULL) return 0;
    if (path[0] != '/') {
        if (getcwd(whole, sizeof whole) == NULL) return 0;
        strncat(whole, "/", sizeof whole - strlen(whole) - 1);
        strncat(whole, path, sizeof whole - strlen(whole) - 1);
        path = whole;
    }
    return strncmp(path, folder, strlen(folder)) == 0;
}

static int below_open(int file) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return below(path);
}

/* 0: go on; else the error to give */
static int fault(char kind, const char* what) {
    const char *on = getenv("FAULTS_ON"), *at = getenv("FAULTS_AT"), *act = getenv("FAULTS_DO"), *log = getenv("FAULTS_LOG");
    if (on != NULL && strchr(on, kind) == NULL) return 0;
    pthread_mutex_lock(&lock);
    long now = ++count;
    pthread_mutex_unlock(&lock);
    if (log != NULL) {
        int file = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT, 0644);
        char line[64];
        int length = snprintf(line, sizeof line, "%ld %s\n", now, what);
        syscall(SYS_write, file, line, (size_t)length);
        syscall(SYS_close, file);
    }
    long from = at == NULL ? 0 : atol(at);
    if (from <= 0 || act == NULL || !(now == from || (now > from && getenv("FAULTS_AGAIN") != NULL))) return 0;
    if (strcmp(act, "kill") == 0) syscall(SYS_kill, getpid(), SIGKILL);
    return atoi(act);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL(kind, yes, what)                \
    if (yes) {                               \
        int error = fault(kind, what);       \
        if (error) {                         \
            errno = error;                   \
            return -1;                       \
        }                                    \
    }

ssize_t write(int file, const void* data, size_t size) {
    FAIL('w', file > 2 && below_open(file), "write")
    return REAL(write)(file, data, size);
}
ssize_t pwrite(int file, const void* data, size_t size, off_t at) {
    FAIL('w', below_open(file), "pwrite")
    return REAL(pwrite)(file, data, size, at);
}
ssize_t pwrite64(int file, const void* data, size_t size, off64_t at) {
    FAIL('w', below_open(file), "pwrite")
    return REAL(pwrite64)(file, data, size, at);
}
int fsync(int file) {
    FAIL('s', below_open(file), "fsync")
    return REAL(fsync)(file);
}
int fdatasync(int file) {
    FAIL('s', below_open(file), "fdatasync")
    return REAL(fdatasync)(file);
}
int rename(const char* from, const char* to) {
    FAIL('r', below(from) || below(to), "rename")
    return REAL(rename)(from, to);
}
int renameat(int a, const char* from, int b, const char* to) {
    FAIL('r', below(from) || below(to), "renameat")
    return REAL(renameat)(a, from, b, to);
}
int ftruncate(int file, off_t size) {
    FAIL('t', below_open(file), "ftruncate")
    return REAL(ftruncate)(file, size);
}
int ftruncate64(int file, off64_t size) {
    FAIL('t', below_open(file), "ftruncate")
    return REAL(ftruncate64)(file, size);
}
int posix_fallocate(int file, off_t at, off_t size) {
    if (below_open(file)) {
        int error = fault('t', "posix_fallocate");
        if (error) return error;
    }
    return REAL(posix_fallocate)(file, at, size);
}
int posix_fallocate64(int file, off64_t at, off64_t size) {
    if (below_open(file)) {
        int error = fault('t', "posix_fallocate");
        if (error) return error;
    }
    return REAL(posix_fallocate64)(file, at, size);
}
int unlink(const char* path) {
    FAIL('u', below(path), "unlink")
    return REAL(unlink)(path);
}
int unlinkat(int folder, const char* path, int flags) {
    FAIL('u', path[0] == '/' ? below(path) : below_open(folder), "unlinkat")
    return REAL(unlinkat)(folder, path, flags);
}
int rmdir(const char* path) {
    FAIL('u', below(path), "rmdir")
    return REAL(rmdir)(path);
}
int mkdir(const char* path, mode_t mode) {
    FAIL('m', below(path), "mkdir")
    return REAL(mkdir)(path, mode);
}
