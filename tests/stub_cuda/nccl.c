/* Stub of NCCL, to be preloaded beside cuda.c.
 *
 * Its calls succeed in the order that NCCL allows, and complete at once: a sum returns the rank's own input, a gather copies
 * it to each place. Each is logged with its stream. Tests with Gloo cover sums over several ranks.
 *
 * STUB_CUDA_HANG: the sum of that number, and all work behind it, never ends, where this is preloaded before cuda.c.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
/* Not needed here; their includes are in another package. */
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
#include <nccl.h>
#include <string.h>
#include <unistd.h>

#include "stub.h"

struct ncclComm {
    int rank, size;
};

static _Atomic int num_sums;

static int hangs(void) {
    const char *text = getenv("STUB_CUDA_HANG");
    return text && num_sums >= atoi(text);
}

API cudaError_t cudaEventQuery(cudaEvent_t event) {
    return hangs() ? cudaErrorNotReady : ((cudaError_t(*)(cudaEvent_t))dlsym(RTLD_NEXT, "cudaEventQuery"))(event);
}

API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    while (hangs())
        usleep(1000);
    return ((cudaError_t(*)(cudaEvent_t))dlsym(RTLD_NEXT, "cudaEventSynchronize"))(event);
}

static size_t bytes_of(size_t count, ncclDataType_t type) {
    switch (type) {
    case ncclInt8:
    case ncclUint8:
        return count;
    case ncclFloat16:
    case ncclBfloat16:
        return 2 * count;
    case ncclInt64:
    case ncclUint64:
    case ncclFloat64:
        return 8 * count;
    default:
        return 4 * count;
    }
}

API ncclResult_t ncclGetVersion(int *version) { return *version = NCCL_VERSION_CODE, ncclSuccess; }

API ncclResult_t ncclGetUniqueId(ncclUniqueId *id) { return memset(id, 7, sizeof *id), ncclSuccess; }

API ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int size, ncclUniqueId id, int rank, ncclConfig_t *config) {
    *comm = malloc(sizeof **comm);
    (*comm)->rank = rank, (*comm)->size = size;
    log_call("nccl rank %d of %d, id %d", rank, size, id.internal[0]);
    return ncclSuccess;
}

API ncclResult_t ncclCommInitRank(ncclComm_t *comm, int size, ncclUniqueId id, int rank) {
    return ncclCommInitRankConfig(comm, size, id, rank, NULL);
}

API ncclResult_t ncclCommAbort(ncclComm_t comm) {
    log_call("nccl abort");
    free(comm);
    return ncclSuccess;
}

API ncclResult_t ncclCommDestroy(ncclComm_t comm) { return ncclCommAbort(comm); }

API ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *error) { return *error = ncclSuccess; }

API ncclResult_t ncclCommCount(const ncclComm_t comm, int *count) { return *count = comm->size, ncclSuccess; }

API ncclResult_t ncclCommUserRank(const ncclComm_t comm, int *rank) { return *rank = comm->rank, ncclSuccess; }

API ncclResult_t ncclGroupStart(void) { return ncclSuccess; }

API ncclResult_t ncclGroupEnd(void) { return ncclSuccess; }

API ncclResult_t ncclAllReduce(
    const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
    log_call("nccl allreduce of %zu of type %d, op %d, on %p", count, type, op, (void *)stream);
    memmove(to, from, bytes_of(count, type));
    num_sums++;
    return ncclSuccess;
}

API ncclResult_t ncclAllGather(
    const void *from, void *to, size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream) {
    log_call("nccl allgather of %zu of type %d, on %p", count, type, (void *)stream);
    for (int rank = 0; rank < comm->size; rank++)
        memmove((char *)to + rank * bytes_of(count, type), from, bytes_of(count, type));
    return ncclSuccess;
}
