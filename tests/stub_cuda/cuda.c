/* Stub of the CUDA driver and runtime, to be preloaded into a process that uses torch's CUDA build.
 *
 * Memory is the host's, streams complete at once and in order, and kernels do nothing, except the one that publishes tokens.
 * It enforces the rules: of captures (forbidden calls and memory, and the invalidation of a capture that breaks them), of
 * the amount of memory, of device pointers. So it tests all of the glue (torch's allocator and graphs, Triton's launchers,
 * the device loop), but no kernel's results. Over 450 lines: one library, preloaded whole, whose calls share one lock and one state.
 *
 * STUB_CUDA_BYTES: memory of the device. STUB_CUDA_FAIL: CALL:N:CODE, the N-th call of that name returns CODE, N of 0 each
 * call while capturing. STUB_CUDA_LOG: a file that gets a line for each call of interest.
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <string.h>

#include "stub.h"

/* A function that succeeds and does nothing. */
#define DONE(type, name, parameters) \
    API type name parameters { return 0; }

enum { NO_MEMORY = 2, BAD_DEVICE = 101, UNSUPPORTED = 900, INVALIDATED = 901, UNMATCHED = 905, CAPTURED_EVENT = 907 };
enum { NUM_SMS = 132, CAPABILITY = 9, SHARED_BYTES = 232448, ALIGNMENT = 4096, JUNK = 0x01 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* ------------------------------------------------------------------ memory */

struct block {
    char *start;
    size_t size;
    int on_host;
    struct block *next;
};

static struct block *blocks;
static size_t used_bytes;

static size_t total_bytes(void) {
    const char *text = getenv("STUB_CUDA_BYTES");
    return text ? strtoull(text, NULL, 0) : (size_t)8 << 30;
}

static struct block *block_of(const void *address) {
    for (struct block *block = blocks; block; block = block->next)
        if ((const char *)address >= block->start && (const char *)address < block->start + block->size)
            return block;
    return NULL;
}

static int allocate(void **address, size_t size, int on_host) {
    int status = 0;
    *address = NULL;
    if (!size)
        return 0;
    pthread_mutex_lock(&lock);
    if ((!on_host && used_bytes + size > total_bytes()) || posix_memalign(address, ALIGNMENT, size)) {
        status = NO_MEMORY;
    } else {
        struct block *block = malloc(sizeof *block);
        *block = (struct block){*address, size, on_host, blocks};
        blocks = block;
        used_bytes += on_host ? 0 : size;
        if (!on_host)
            memset(*address, JUNK, size);
    }
    pthread_mutex_unlock(&lock);
    return status;
}

static int release(void *address) {
    int status = address != NULL;
    pthread_mutex_lock(&lock);
    for (struct block **at = &blocks; address && *at; at = &(*at)->next) {
        struct block *block = *at;
        if (block->start != address)
            continue;
        *at = block->next;
        used_bytes -= block->on_host ? 0 : block->size;
        free(block->start);
        free(block);
        status = 0;
        break;
    }
    pthread_mutex_unlock(&lock);
    return status;
}

/* ------------------------------------------------------------------ streams and graphs */

enum { MAX_ARGUMENTS = 17 };

struct node {
    enum { COPY, FILL, KERNEL } kind;
    void *to;
    const void *from;
    size_t size;
    int value;
    const char *kernel;
    void *arguments[MAX_ARGUMENTS];
};

struct CUgraph_st {
    int count;
    int capacity;
    struct node *nodes;
};

struct CUgraphExec_st {
    CUgraph graph;
};

struct CUstream_st {
    CUgraph captures;
    int mode;
    int is_broken;
    unsigned long long id;
};

static struct CUstream_st default_stream;
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static __thread int captures_of_thread;
static int global_captures;

static struct CUstream_st *stream_of(void *handle) {
    return (size_t)handle < 3 ? &default_stream : handle; /* 0, the legacy and the thread's default */
}

static int forbidden(const char *call) {
    log_call("FORBIDDEN while capturing: %s", call);
    fprintf(stderr, "stub CUDA: forbidden while capturing: %s\n", call);
    return UNSUPPORTED;
}

/* Calls that wait for a device or change it are forbidden during a capture, unless the thread's capture mode is relaxed. */
static int unsafe(const char *call) {
    int watched = captures_of_thread || (thread_mode == cudaStreamCaptureModeGlobal && global_captures);
    return watched && thread_mode != cudaStreamCaptureModeRelaxed ? forbidden(call) : 0;
}

static int waits_for(void *handle, const char *call) {
    struct CUstream_st *stream = stream_of(handle);
    if (!stream->captures)
        return unsafe(call);
    stream->is_broken = 1;
    return forbidden(call);
}

/* Return the code with which this call of `name` is to fail. */
static int injected(const char *name) {
    static int calls;
    const char *wanted = getenv("STUB_CUDA_FAIL");
    size_t length = strlen(name);
    if (!wanted || strncmp(wanted, name, length) || wanted[length] != ':')
        return 0;
    char *rest;
    long number = strtol(wanted + length + 1, &rest, 10);
    int fails = number ? ++calls == number : captures_of_thread;
    if (fails)
        log_call("%s fails as asked", name);
    return fails ? atoi(rest + 1) : 0;
}

/* The end of a captured step (neuron/triton_kernels/decode_step.py): some token for each row, to the host and to the next step. */
static void end_step(void *const *arguments) {
    static int token;
    enum { LAST = 9, PLACE, PUBLISHED, ALL_ENDED, ROWS, STRIDE = 16 };
    enum { FIRST_TOKEN = 5, NUM_TOKENS = 90, SPARE_PLACE = 128 };
    int *last = arguments[LAST], *place = arguments[PLACE], *published = arguments[PUBLISHED];
    int num_rows = (int)(size_t)arguments[ROWS], stride = (int)(size_t)arguments[STRIDE];
    if (*place < 0 || *place > SPARE_PLACE)
        *place = SPARE_PLACE; /* a kernel of torch had set it */
    for (int row = 0; row < num_rows; row++)
        published[*place * stride + row] = last[row] = FIRST_TOKEN + token++ % NUM_TOKENS;
    *place += 1;
    *(int *)arguments[ALL_ENDED] = 0;
}

/* Values that kernels would publish: all flags true, and all tokens valid. */
static void make_sound(void *published, size_t size) {
    enum { MOST_ROWS = 64, SOME_TOKEN = 7 };
    if (size % sizeof(int))
        memset(published, JUNK, size);
    else if (size <= MOST_ROWS * sizeof(int))
        for (int *token = published; token < (int *)published + size / sizeof(int); token++)
            *token = *token < 0 ? SOME_TOKEN : *token;
}

static void run(const struct node *node) {
    if (node->kind == FILL) {
        memset(node->to, node->value, node->size);
    } else if (node->kind == KERNEL) {
        if (!strcmp(node->kernel, "_end_kernel"))
            end_step(node->arguments);
    } else {
        struct block *source = block_of(node->from);
        memmove(node->to, node->from, node->size);
        if (source && !source->on_host)
            make_sound(node->to, node->size);
    }
}

static int queue(void *handle, struct node node) {
    CUgraph graph = stream_of(handle)->captures;
    if (!graph) {
        run(&node);
        return 0;
    }
    if (graph->count == graph->capacity) {
        graph->capacity = 2 * graph->capacity + 16;
        graph->nodes = realloc(graph->nodes, graph->capacity * sizeof node);
    }
    graph->nodes[graph->count++] = node;
    return 0;
}

static const char *captured(void *handle) { return stream_of(handle)->captures ? " captured" : ""; }

/* ------------------------------------------------------------------ the runtime */

static __thread cudaError_t last_error;

static cudaError_t set_last_error(int code) {
    if (code && code != cudaErrorNotReady)
        last_error = code;
    return code;
}

API cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
API cudaError_t cudaPeekAtLastError(void) { return last_error; }
API const char *cudaGetErrorName(cudaError_t error) {
    return (int)error == NO_MEMORY ? "cudaErrorMemoryAllocation" : "cudaErrorOfStub";
}
API const char *cudaGetErrorString(cudaError_t error) {
    return (int)error == NO_MEMORY ? "out of memory"
           : error == 700         ? "an illegal memory access was encountered"
                                  : "stub CUDA error";
}

static int attribute(int which) {
    switch (which) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return 2147483647;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return 65536;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return NUM_SMS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return CAPABILITY;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return 0;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return 49152;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return SHARED_BYTES;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return SHARED_BYTES + 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return 2048;
    default: return 1;
    }
}

API cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    *properties = (struct cudaDeviceProp){
        .name = "Stub",
        .totalGlobalMem = total_bytes(),
        .sharedMemPerBlock = 49152,
        .sharedMemPerBlockOptin = SHARED_BYTES,
        .sharedMemPerMultiprocessor = SHARED_BYTES + 1024,
        .regsPerBlock = 65536,
        .regsPerMultiprocessor = 65536,
        .warpSize = 32,
        .maxThreadsPerBlock = 1024,
        .maxThreadsDim = {1024, 1024, 64},
        .maxGridSize = {2147483647, 65535, 65535},
        .major = CAPABILITY,
        .multiProcessorCount = NUM_SMS,
        .maxThreadsPerMultiProcessor = 2048,
        .l2CacheSize = 50 << 20,
        .unifiedAddressing = 1,
        .concurrentKernels = 1,
        .textureAlignment = 512,
    };
    return cudaSuccess;
}
API cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
API cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
API cudaError_t cudaSetDevice(int device) { return set_last_error(device ? BAD_DEVICE : 0); }
API cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDA_VERSION, cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDA_VERSION, cudaSuccess; }
API cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
    return *value = attribute(which), cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int device) {
    return snprintf(text, size, "0000:00:00.0"), cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    return *least = 0, *greatest = -5, cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int *can, int from, int to) { return *can = 0, cudaSuccess; }
API cudaError_t cudaDeviceSynchronize(void) { return set_last_error(unsafe("cudaDeviceSynchronize")); }

API cudaError_t cudaMalloc(void **address, size_t size) {
    int code = unsafe("cudaMalloc");
    if (!code)
        code = injected("cudaMalloc");
    if (!code)
        code = allocate(address, size, 0);
    log_call("malloc of %zu%s", size, code ? " fails" : "");
    return set_last_error(code);
}
API cudaError_t cudaFree(void *address) {
    return set_last_error(address && unsafe("cudaFree") ? UNSUPPORTED : release(address));
}
API cudaError_t cudaHostAlloc(void **address, size_t size, unsigned flags) {
    return set_last_error(unsafe("cudaHostAlloc") ? UNSUPPORTED : allocate(address, size, 1));
}
API cudaError_t cudaFreeHost(void *address) { return set_last_error(unsafe("cudaFreeHost") ? UNSUPPORTED : release(address)); }
API cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *all_bytes) {
    return *all_bytes = total_bytes(), *free_bytes = *all_bytes - used_bytes, cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *address) {
    struct block *block = block_of(address);
    *attributes = (struct cudaPointerAttributes){
        .type = !block            ? cudaMemoryTypeUnregistered
                : block->on_host ? cudaMemoryTypeHost
                                 : cudaMemoryTypeDevice,
        .devicePointer = block ? (void *)address : NULL,
        .hostPointer = block && block->on_host ? (void *)address : NULL,
    };
    return cudaSuccess;
}

API cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    int is_pageable = !block_of(to) || !block_of(from);
    log_call("copy of %zu%s%s", size, is_pageable ? " pageable" : "", captured(stream));
    if (is_pageable && stream_of(stream)->captures)
        return set_last_error(forbidden("a copy of pageable memory"));
    return queue(stream, (struct node){.kind = COPY, .to = to, .from = from, .size = size});
}
API cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    return unsafe("cudaMemcpy") ? set_last_error(UNSUPPORTED) : cudaMemcpyAsync(to, from, size, kind, NULL);
}
API cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
    return queue(stream, (struct node){.kind = FILL, .to = to, .size = size, .value = value});
}
API cudaError_t cudaMemset(void *to, int value, size_t size) { return cudaMemsetAsync(to, value, size, NULL); }

API cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    return *stream = calloc(1, sizeof **stream), cudaSuccess;
}
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    return cudaStreamCreate(stream);
}
API cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { return *priority = 0, cudaSuccess; }
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return set_last_error(waits_for(stream, "cudaStreamSynchronize")); }
API cudaError_t cudaStreamQuery(cudaStream_t stream) { return set_last_error(waits_for(stream, "cudaStreamQuery")); }
API cudaError_t cudaStreamIsCapturing(cudaStream_t handle, enum cudaStreamCaptureStatus *status) {
    struct CUstream_st *stream = stream_of(handle);
    *status = !stream->captures     ? cudaStreamCaptureStatusNone
              : stream->is_broken ? cudaStreamCaptureStatusInvalidated
                                  : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
    const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count) {
    cudaStreamIsCapturing(stream, status);
    if (id)
        *id = stream_of(stream)->id;
    if (graph)
        *graph = stream_of(stream)->captures;
    if (nodes)
        *nodes = NULL;
    if (edges)
        *edges = NULL;
    if (count)
        *count = 0;
    return cudaSuccess;
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode before = thread_mode;
    thread_mode = *mode;
    return *mode = before, cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t handle, enum cudaStreamCaptureMode mode) {
    static unsigned long long id;
    struct CUstream_st *stream = stream_of(handle);
    if (stream == &default_stream || stream->captures)
        return set_last_error(INVALIDATED);
    *stream = (struct CUstream_st){calloc(1, sizeof(struct CUgraph_st)), mode, 0, ++id};
    captures_of_thread++;
    global_captures += mode == cudaStreamCaptureModeGlobal;
    log_call("capture begins");
    return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *graph) {
    struct CUstream_st *stream = stream_of(handle);
    if (!stream->captures)
        return set_last_error(UNMATCHED);
    *graph = stream->is_broken ? NULL : stream->captures;
    log_call("capture ends: %d", *graph ? (*graph)->count : -1);
    stream->captures = NULL;
    captures_of_thread--;
    global_captures -= stream->mode == cudaStreamCaptureModeGlobal;
    return set_last_error(stream->is_broken ? INVALIDATED : 0);
}

API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    return *count = graph->count, cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags) {
    int code = injected("cuGraphInstantiateWithFlags");
    *exec = code ? NULL : calloc(1, sizeof **exec);
    if (!code)
        (*exec)->graph = graph;
    return code;
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    int code = injected("cuGraphLaunch");
    log_call("graph of %d", exec->graph->count);
    for (int i = 0; i < exec->graph->count && !code; i++)
        run(&exec->graph->nodes[i]);
    return code;
}

/* An event records whether it was recorded in a capture, where a query of it is forbidden. */
API cudaError_t cudaEventCreate(cudaEvent_t *event) { return *event = calloc(1, sizeof(int)), cudaSuccess; }
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return cudaEventCreate(event); }
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return *(int *)event = stream_of(stream)->captures != NULL, cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    return cudaEventRecord(event, stream);
}
API cudaError_t cudaEventQuery(cudaEvent_t event) {
    return set_last_error(*(int *)event ? forbidden("a query of its event"), CAPTURED_EVENT : unsafe("cudaEventQuery"));
}
API cudaError_t cudaEventSynchronize(cudaEvent_t event) { return set_last_error(unsafe("cudaEventSynchronize")); }
API cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) { return *ms = 1, cudaSuccess; }

API cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    *attributes = (struct cudaFuncAttributes){.maxThreadsPerBlock = 1024, .numRegs = 32, .binaryVersion = 10 * CAPABILITY};
    return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *count, const void *function, int size, size_t shared_bytes, unsigned flags) {
    return *count = 2, cudaSuccess;
}

/* Kernels of torch, identified by the address of their stubs. */
enum { KNOWN = 1 << 20 };
static struct {
    const void *stub;
    const char *name;
} known[KNOWN];

static size_t place_of(const void *stub) {
    size_t place = ((size_t)stub * 0x9E3779B97F4A7C15u) >> 44;
    while (known[place].stub && known[place].stub != stub)
        place = (place + 1) % KNOWN;
    return place;
}

static cudaError_t launch_torch(const void *stub, cudaStream_t stream) {
    const char *name = known[place_of(stub)].name;
    log_call("torch %.200s%s", name ? name : "?", captured(stream));
    return queue(stream, (struct node){.kind = KERNEL, .kernel = ""});
}

API void **__cudaRegisterFatBinary(void *binary) {
    static void *handle;
    return &handle;
}
API void __cudaRegisterFatBinaryEnd(void **handle) {}
API void __cudaUnregisterFatBinary(void **handle) {}
API void __cudaRegisterVar(
    void **handle, char *host, char *device, const char *name, int is_extern, size_t size, int is_constant, int is_global) {}
API void __cudaRegisterFunction(
    void **handle, const char *stub, char *function, const char *name, int limit, void *thread, void *block,
    void *block_size, void *grid_size, int *warp_size) {
    size_t place = place_of(stub);
    known[place].stub = stub;
    known[place].name = name;
}

static __thread struct {
    dim3 grid, block;
    size_t shared_bytes;
    void *stream;
} call;
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, struct CUstream_st *stream) {
    call.grid = grid, call.block = block, call.shared_bytes = shared_bytes, call.stream = stream;
    return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared_bytes, void *stream) {
    *grid = call.grid, *block = call.block, *shared_bytes = call.shared_bytes, *(void **)stream = call.stream;
    return cudaSuccess;
}
API cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *stub) {
    return *kernel = (cudaKernel_t)stub, cudaSuccess;
}
API cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared_bytes, cudaStream_t stream) {
    return launch_torch(kernel, stream);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *stub, void **arguments) {
    return launch_torch(stub, config->stream);
}

DONE(cudaError_t, cudaStreamDestroy, (cudaStream_t stream))
DONE(cudaError_t, cudaStreamWaitEvent, (cudaStream_t stream, cudaEvent_t event, unsigned flags))
DONE(cudaError_t, cudaEventDestroy, (cudaEvent_t event))
DONE(cudaError_t, cudaGraphDestroy, (cudaGraph_t graph))
DONE(cudaError_t, cudaGraphExecDestroy, (cudaGraphExec_t exec))
DONE(cudaError_t, cudaFuncSetAttribute, (const void *function, enum cudaFuncAttribute which, int value))
DONE(cudaError_t, cudaMemcpyToSymbol, (const void *to, const void *from, size_t size, size_t at, enum cudaMemcpyKind kind))

/* ------------------------------------------------------------------ the driver */

API cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **function, unsigned version, unsigned long long flags,
    enum cudaDriverEntryPointQueryResult *result) {
    char versioned[100];
    snprintf(versioned, sizeof versioned, "%s_v2", name);
    *function = dlsym(RTLD_DEFAULT, name);
    if (!*function)
        *function = dlsym(RTLD_DEFAULT, versioned);
    if (result)
        *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

static int context;
DONE(CUresult, cuInit, (unsigned flags))
API CUresult cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
API CUresult cuGetErrorName(CUresult error, const char **name) {
    return *name = (int)error == NO_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OF_STUB", CUDA_SUCCESS;
}
API CUresult cuGetErrorString(CUresult error, const char **text) {
    return *text = cudaGetErrorString(error), CUDA_SUCCESS;
}
API CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = 0, ordinal ? BAD_DEVICE : CUDA_SUCCESS; }
API CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
    return snprintf(name, size, "Stub"), CUDA_SUCCESS;
}
API CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
    return *value = attribute(which), CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxRetain(CUcontext *found, CUdevice device) {
    return *found = (CUcontext)&context, CUDA_SUCCESS;
}
DONE(CUresult, cuDevicePrimaryCtxRelease_v2, (CUdevice device))
API CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *is_active) {
    return *flags = 0, *is_active = 1, CUDA_SUCCESS;
}
API CUresult cuCtxGetCurrent(CUcontext *found) { return *found = (CUcontext)&context, CUDA_SUCCESS; }
DONE(CUresult, cuCtxSetCurrent, (CUcontext chosen))
DONE(CUresult, cuCtxSetLimit, (CUlimit limit, size_t value))
API CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 1 << 20, CUDA_SUCCESS; }
API CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *all_bytes) { return cudaMemGetInfo(free_bytes, all_bytes); }
API CUresult cuStreamCreate(CUstream *stream, unsigned flags) { return cudaStreamCreate(stream); }
DONE(CUresult, cuStreamDestroy_v2, (CUstream stream))
API CUresult cuStreamSynchronize(CUstream stream) { return waits_for(stream, "cuStreamSynchronize"); }
API CUresult cuStreamQuery(CUstream stream) { return waits_for(stream, "cuStreamQuery"); }
API CUresult cuEventCreate(CUevent *event, unsigned flags) { return cudaEventCreate(event); }
DONE(CUresult, cuEventDestroy_v2, (CUevent event))
API CUresult cuEventRecord(CUevent event, CUstream stream) { return cudaEventRecord(event, stream); }
API CUresult cuEventSynchronize(CUevent event) { return unsafe("cuEventSynchronize"); }
API CUresult cuGraphInstantiateWithFlags(CUgraphExec *exec, CUgraph graph, unsigned long long flags) {
    return cudaGraphInstantiateWithFlags(exec, graph, flags);
}
API CUresult cuGraphLaunch(CUgraphExec exec, CUstream stream) { return cudaGraphLaunch(exec, stream); }
DONE(CUresult, cuGraphExecDestroy, (CUgraphExec exec))
API CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr address) {
    if (!block_of((void *)address))
        return CUDA_ERROR_INVALID_VALUE;
    if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
        *(CUdeviceptr *)value = address;
    return CUDA_SUCCESS;
}

API CUresult cuMemGetAddressRange_v2(CUdeviceptr *start, size_t *size, CUdeviceptr address) {
    struct block *block = block_of((void *)address);
    if (!block)
        return CUDA_ERROR_NOT_FOUND;
    return *start = (CUdeviceptr)block->start, *size = block->size, CUDA_SUCCESS;
}

API CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    int code = unsafe("cuModuleLoadData") ? UNSUPPORTED : injected("cuModuleLoadData");
    *module = calloc(1, sizeof(int));
    return code ? code : memcmp(image, "\177ELF", 4) ? CUDA_ERROR_INVALID_IMAGE : CUDA_SUCCESS;
}
DONE(CUresult, cuModuleUnload, (CUmodule module))
/* A function is its name. */
API CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    return *function = (CUfunction)strdup(name), CUDA_SUCCESS;
}
API CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
    return *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 32, CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
    return unsafe("cuFuncSetAttribute");
}
API CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return unsafe("cuFuncSetCacheConfig"); }
API CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
    return *count = 1, CUDA_SUCCESS;
}

API CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
    const char *name = (const char *)function;
    struct node node = {.kind = KERNEL, .kernel = name};
    int is_dependent = 0;
    for (unsigned i = 0; i < config->numAttrs; i++)
        if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
            is_dependent = config->attrs[i].value.programmaticStreamSerializationAllowed;
    if (!strcmp(name, "_end_kernel"))
        for (int i = 0; i < MAX_ARGUMENTS; i++)
            node.arguments[i] = i < 13 ? *(void **)parameters[i] : (void *)(size_t)*(int *)parameters[i];
    log_call("kernel %s%s%s", name, is_dependent ? " dependent" : "", captured(config->hStream));
    int code = injected("cuLaunchKernelEx");
    return code ? code : queue(config->hStream, node);
}
API CUresult cuLaunchKernel(
    CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y, unsigned threads_z,
    unsigned shared_bytes, CUstream stream, void **parameters, void **extra) {
    CUlaunchConfig config = {.hStream = stream};
    return cuLaunchKernelEx(&config, function, parameters, extra);
}

/* ------------------------------------------------------------------ cuBLAS: a handle is its stream */

API int cublasCreate_v2(void **handle) { return *handle = calloc(1, sizeof(void *)), 0; }
API int cublasSetStream_v2(void **handle, void *stream) { return *handle = stream, 0; }
API int cublasGetMathMode(void *handle, int *mode) { return *mode = 0; }
API int cublasGetPointerMode_v2(void *handle, int *mode) { return *mode = 0; }
API int cublasGemmEx(void **handle) { return queue(*handle, (struct node){.kind = KERNEL, .kernel = ""}); }
API int cublasGemmStridedBatchedEx(void **handle) { return cublasGemmEx(handle); }
DONE(int, cublasDestroy_v2, (void *handle))
DONE(int, cublasSetWorkspace_v2, (void *handle, void *workspace, size_t size))
DONE(int, cublasSetMathMode, (void *handle, int mode))
DONE(int, cublasSetPointerMode_v2, (void *handle, int mode))

/* ------------------------------------------------------------------ NVML, for the daemon */

API int nvmlInit_v2(void) { return 0; }
API int nvmlInitWithFlags(unsigned flags) { return 0; }
API int nvmlShutdown(void) { return 0; }
API int nvmlSystemGetCudaDriverVersion_v2(int *version) { return *version = CUDA_VERSION, 0; }
API int nvmlSystemGetDriverVersion(char *text, unsigned size) { return snprintf(text, size, "580.0"), 0; }
API int nvmlDeviceGetCount_v2(unsigned *count) { return *count = 1, 0; }
API int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { return *device = &context, index ? 2 : 0; }
API int nvmlDeviceGetUUID(void *device, char *text, unsigned size) { return snprintf(text, size, "GPU-stub"), 0; }
API int nvmlDeviceGetName(void *device, char *text, unsigned size) { return snprintf(text, size, "Stub"), 0; }
API int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *total_free_used) {
    total_free_used[0] = total_bytes(), total_free_used[1] = total_bytes() - used_bytes, total_free_used[2] = used_bytes;
    return 0;
}
API int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
    return *major = CAPABILITY, *minor = 0;
}
