// Preloaded (LD_PRELOAD): the n-th write of this process, or change of a directory, fails with ENOSPC, as on a full disk.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long left = -1;  // calls until they fail; negative: never
static long calls;

void faults_after(long n) {
  left = n;
  calls = 0;
}

long faults_calls(void) { return calls; }

// From the n-th call on a full disk stays full.
static int full(int fd) {
  struct stat status;
  if (fd >= 0 && fd <= 2) return 0;  // messages must get through
  if (fd >= 0 && (fstat(fd, &status) || !S_ISREG(status.st_mode))) return 0;  // pipes and terminals
  calls++;
  if (left < 0 || calls <= left) return 0;
  errno = ENOSPC;
  return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t size) { return full(fd) ? -1 : REAL(write)(fd, data, size); }
ssize_t writev(int fd, const struct iovec *parts, int count) {
  return full(fd) ? -1 : REAL(writev)(fd, parts, count);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
  return full(fd) ? -1 : REAL(pwrite)(fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
  return full(fd) ? -1 : REAL(pwrite64)(fd, data, size, at);
}
int ftruncate64(int fd, off64_t size) { return size > 0 && full(fd) ? -1 : REAL(ftruncate64)(fd, size); }
int mkdir(const char *path, mode_t mode) { return full(-1) ? -1 : REAL(mkdir)(path, mode); }

// Creating a file takes room; opening one does not.
static mode_t mode_of(int flags, va_list more) { return flags & O_CREAT ? va_arg(more, mode_t) : 0; }
#define OPEN(name)                                                                   \
  int name(const char *path, int flags, ...) {                                       \
    va_list more;                                                                    \
    va_start(more, flags);                                                           \
    mode_t mode = mode_of(flags, more);                                              \
    va_end(more);                                                                    \
    if ((flags & O_CREAT) && access(path, F_OK) && full(-1)) return -1;              \
    return REAL(name)(path, flags, mode);                                            \
  }
OPEN(open)
OPEN(open64)
