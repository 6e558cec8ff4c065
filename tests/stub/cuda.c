/* The CUDA driver as far as the crate asks for it: memory is host memory, kernels do nothing. It counts every call and every object,
   notices handles that are not alive, can fail any call, and keeps the rules of capture that the crate relies on. */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_HANDLE = 400, CAPTURE_UNSUPPORTED = 900,
       CAPTURE_INVALIDATED = 901, CAPTURE_ISOLATION = 905, CAPTURED_EVENT = 907 };
enum { CONTEXT, STREAM, EVENT, MODULE, GRAPH, EXEC, MEMORY, KINDS };
enum { DEVICES = 2, LOG = 1 << 16 };

typedef struct Object {
  int kind, alive, device;
  int capture;            /* of a stream: number of the capture, 0: none, -1: invalidated; of an event: where it was recorded */
  int kernels, others;    /* nodes of the capture of a stream, or of a graph */
  size_t bytes;           /* of memory, which follows */
  struct Object* module;  /* of a function */
  struct Object* next;
} Object;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static Object contexts[DEVICES] = {{CONTEXT, 0, 0}, {CONTEXT, 0, 1}}, default_stream = {STREAM, 1}, thread_stream = {STREAM, 1};
static Object* memory;
static _Thread_local Object* current;
static const char* calls[LOG];
static long count, fail_at, captures;
static int fail_code, fail_always, arch = 90, version = 13000, live[KINDS], misuse, launched;
static size_t used, limit;

/* What tests ask. */
void stub_arch(int value) { arch = value; }
void stub_version(int value) { version = value; }
void stub_limit(size_t bytes) { limit = bytes; }
void stub_clear(void) { count = launched = 0; }
void stub_fail(long nth, int code, int always) { fail_at = nth, fail_code = code, fail_always = always; }
long stub_calls(void) { return count; }
const char* stub_call(long at) { return at < count && at < LOG ? calls[at] : ""; }
int stub_live(int kind) { return live[kind]; }
int stub_misuse(void) { return misuse; }
int stub_launched(void) { return launched; }

static int enter(const char* name) {
  if (count < LOG) calls[count] = name;
  ++count;
  return fail_at != 0 && (count == fail_at || (fail_always && count > fail_at)) ? fail_code : OK;
}

/* Every function is one critical section; its body sets `code`. */
#define CALL(name, args, ...)                   \
  int name args {                              \
    pthread_mutex_lock(&mutex);                \
    int code = enter(#name);                   \
    if (code == OK) __VA_ARGS__                \
    pthread_mutex_unlock(&mutex);              \
    return code;                               \
  }

static Object* made(int kind) {
  Object* object = calloc(1, sizeof *object);
  object->kind = kind, object->alive = 1, object->device = current != NULL ? current->device : 0;
  ++live[kind];
  return object;
}

/* Objects are never freed: one that was destroyed is found to be so. */
static int is(Object* object, int kind) {
  if (object != NULL && object->kind == kind && object->alive) return 1;
  ++misuse;
  return 0;
}

static int destroyed(Object* object, int kind) {
  if (!is(object, kind)) return INVALID_HANDLE;
  object->alive = 0;
  --live[kind];
  return OK;
}

static Object* stream_of(void* handle) {
  return handle == NULL ? &default_stream : handle == (void*)2 ? &thread_stream : handle;
}

static int node(Object* stream, int is_kernel) {
  if (!is(stream, STREAM)) return INVALID_HANDLE;
  if (stream->capture < 0) return CAPTURE_INVALIDATED;
  if (stream->capture > 0) is_kernel ? ++stream->kernels : ++stream->others;
  return OK;
}

static int waits(Object* stream) {
  if (!is(stream, STREAM)) return INVALID_HANDLE;
  if (stream->capture == 0) return OK;
  stream->capture = -1;
  return CAPTURE_UNSUPPORTED;
}

CALL(cuInit, (unsigned flags), { code = flags == 0 ? OK : INVALID_VALUE; })
CALL(cuDriverGetVersion, (int* out), { *out = version; })
CALL(cuDeviceGetCount, (int* out), { *out = DEVICES; })
CALL(cuDeviceGet, (int* out, int ordinal), { if (ordinal < DEVICES) *out = ordinal; else code = INVALID_DEVICE; })
CALL(cuDeviceGetName, (char* out, int bytes, int device), { strncpy(out, "a stub of a driver", bytes); })
CALL(cuDeviceGetAttribute, (int* out, int attribute, int device), {
  switch (attribute) {
    case 16: *out = 132; break;                                /* multiprocessors */
    case 75: *out = arch / 10; break;
    case 76: *out = arch % 10; break;
    case 81: *out = arch == 80 ? 167936 : 233472; break;       /* shared memory per multiprocessor */
    case 97: *out = arch == 80 ? 166912 : 232448; break;       /* per block */
    case 115: *out = 1; break;                                 /* memory pools */
    default: code = INVALID_VALUE;
  }
})
CALL(cuDevicePrimaryCtxRetain, (Object** out, int device), { *out = &contexts[device], (*out)->alive = 1, ++live[CONTEXT]; })
CALL(cuDevicePrimaryCtxRelease_v2, (int device), { --live[CONTEXT]; })
CALL(cuCtxGetCurrent, (Object** out), { *out = current; })
CALL(cuCtxSetCurrent, (Object* context), { if (is(context, CONTEXT)) current = context; else code = INVALID_HANDLE; })
CALL(cuCtxSynchronize, (void), {})

CALL(cuModuleLoadData, (Object** out, const void* image), { *out = made(MODULE); })
CALL(cuModuleUnload, (Object* module), { code = destroyed(module, MODULE); })
CALL(cuModuleGetFunction, (Object** out, Object* module, const char* name), {
  if (!is(module, MODULE)) code = INVALID_HANDLE;
  else *out = calloc(1, sizeof **out), (*out)->module = module;
})
CALL(cuFuncGetAttribute, (int* out, int attribute, Object* function), { *out = 0; })
CALL(cuFuncSetAttribute, (Object* function, int attribute, int value), {
  if (!is(function->module, MODULE)) code = INVALID_HANDLE;
})
CALL(cuLaunchKernel, (Object* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                      unsigned shared, void* stream, void** params, void** extra), {
  if (!is(function->module, MODULE) || params == NULL || gx * gy * gz == 0 || bx * by * bz == 0) code = INVALID_VALUE;
  else code = node(stream_of(stream), 1);
  if (code == OK && stream_of(stream)->capture == 0) ++launched;
})
typedef struct { unsigned grid[3], block[3], shared; void* stream; void* attributes; unsigned count; } Config;
CALL(cuLaunchKernelEx, (const Config* config, Object* function, void** params, void** extra), {
  if (!is(function->module, MODULE) || params == NULL || config->count != 1) code = INVALID_VALUE;
  else code = node(stream_of(config->stream), 1);
  if (code == OK && stream_of(config->stream)->capture == 0) ++launched;
})
CALL(cuTensorMapEncodeTiled, (uint64_t* out, int type, uint32_t rank, void* address, const uint64_t* dims, const uint64_t* strides,
                              const uint32_t* boxes, const uint32_t* steps, int interleave, int swizzle, int promotion, int fill), {
  if ((uintptr_t)address % 16 != 0 || rank != 2 || strides[0] % 16 != 0) code = INVALID_VALUE;
  else out[0] = (uint64_t)address;
})

CALL(cuStreamCreate, (Object** out, unsigned flags), { *out = made(STREAM); })
CALL(cuStreamDestroy_v2, (Object* stream), { code = destroyed(stream, STREAM); })
CALL(cuStreamSynchronize, (void* stream), { code = waits(stream_of(stream)); })
CALL(cuStreamIsCapturing, (void* stream, int* out), {
  if (!is(stream_of(stream), STREAM)) code = INVALID_HANDLE;
  else *out = stream_of(stream)->capture > 0 ? 1 : stream_of(stream)->capture < 0 ? 2 : 0;
})
CALL(cuStreamWaitEvent, (void* handle, Object* event, unsigned flags), {
  Object* stream = stream_of(handle);
  if (!is(stream, STREAM) || !is(event, EVENT)) code = INVALID_HANDLE;
  else if (stream->capture != event->capture) {
    code = stream->capture != 0 ? CAPTURE_ISOLATION : CAPTURED_EVENT;
    if (stream->capture != 0) stream->capture = -1;
  }
})
CALL(cuEventCreate, (Object** out, unsigned flags), { *out = made(EVENT); })
CALL(cuEventDestroy_v2, (Object* event), { code = destroyed(event, EVENT); })
CALL(cuEventRecord, (Object* event, void* stream), {
  if (!is(event, EVENT) || !is(stream_of(stream), STREAM)) code = INVALID_HANDLE;
  else event->capture = stream_of(stream)->capture;
})

CALL(cuStreamBeginCapture_v2, (Object* stream, int mode), {
  if (!is(stream, STREAM) || stream->capture != 0) code = INVALID_HANDLE;
  else stream->capture = ++captures, stream->kernels = stream->others = 0;
})
CALL(cuStreamEndCapture, (Object* stream, Object** out), {
  *out = NULL;
  if (!is(stream, STREAM) || stream->capture == 0) code = INVALID_HANDLE;
  else if (stream->capture < 0) code = CAPTURE_INVALIDATED;
  else *out = made(GRAPH), (*out)->kernels = stream->kernels, (*out)->others = stream->others;
  if (code != INVALID_HANDLE) stream->capture = 0;
})
CALL(cuGraphInstantiateWithFlags, (Object** out, Object* graph, unsigned long long flags), {
  if (!is(graph, GRAPH)) code = INVALID_HANDLE;
  else *out = made(EXEC), (*out)->kernels = graph->kernels, (*out)->others = graph->others;
})
CALL(cuGraphLaunch, (Object* exec, void* stream), {
  if (!is(exec, EXEC) || !is(stream_of(stream), STREAM)) code = INVALID_HANDLE;
  else launched += exec->kernels + exec->others;
})
CALL(cuGraphExecDestroy, (Object* exec), { code = destroyed(exec, EXEC); })
CALL(cuGraphDestroy, (Object* graph), { code = destroyed(graph, GRAPH); })

enum { HEADER = 256 };

static int allocate(uint64_t* out, size_t bytes) {
  if (bytes == 0) return INVALID_VALUE;
  void* block = NULL;
  if ((limit != 0 && bytes > limit - (used < limit ? used : limit)) || bytes > (size_t)1 << 40) return OUT_OF_MEMORY;
  if (posix_memalign(&block, HEADER, HEADER + (bytes + HEADER - 1) / HEADER * HEADER) != 0) return OUT_OF_MEMORY;
  Object* object = block;
  memset(object, 0, sizeof *object);
  object->kind = MEMORY, object->alive = 1, object->bytes = bytes, object->next = memory, memory = object;
  used += bytes, ++live[MEMORY];
  *out = (uint64_t)block + HEADER;
  return OK;
}

static int release(uint64_t address) {
  for (Object** at = &memory; *at != NULL; at = &(*at)->next) {
    Object* object = *at;
    if ((uint64_t)object + HEADER != address) continue;
    *at = object->next;
    used -= object->bytes, --live[MEMORY];
    free(object);
    return OK;
  }
  ++misuse;
  return INVALID_VALUE;
}

/* The bytes lie in one allocation. */
static int within(uint64_t address, size_t bytes) {
  for (Object* at = memory; at != NULL; at = at->next) {
    const uint64_t from = (uint64_t)at + HEADER;
    if (address >= from && address + bytes <= from + at->bytes) return 1;
  }
  ++misuse;
  return 0;
}

CALL(cuMemAllocAsync, (uint64_t* out, size_t bytes, void* stream), {
  code = node(stream_of(stream), 0);
  if (code == OK) code = allocate(out, bytes);
})
CALL(cuMemAlloc_v2, (uint64_t* out, size_t bytes), { code = allocate(out, bytes); })
CALL(cuMemFreeAsync, (uint64_t address, void* stream), {
  code = node(stream_of(stream), 0);
  if (code == OK) code = release(address);
})
CALL(cuMemFree_v2, (uint64_t address), { code = release(address); })
CALL(cuMemsetD8Async, (uint64_t address, unsigned char value, size_t bytes, void* stream), {
  code = node(stream_of(stream), 0);
  if (code == OK && within(address, bytes)) memset((void*)address, value, bytes);
})
CALL(cuMemcpyHtoDAsync_v2, (uint64_t to, const void* from, size_t bytes, void* stream), {
  code = node(stream_of(stream), 0);
  if (code == OK && within(to, bytes)) memcpy((void*)to, from, bytes);
})
CALL(cuMemcpyDtoHAsync_v2, (void* to, uint64_t from, size_t bytes, void* stream), {
  code = node(stream_of(stream), 0);
  if (code == OK && within(from, bytes)) memcpy(to, (void*)from, bytes);
})

int cuGetErrorName(int error, const char** out) { return *out = "STUB_ERROR", OK; }
int cuGetErrorString(int error, const char** out) { return *out = "as the test asked for", OK; }
