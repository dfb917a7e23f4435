/* Table of the level that this file is compiled for. */
#include "kernels.h"
#include "simd.h"

void LEVEL(matmul)(const struct matmul *, int, int);
void LEVEL(rms_norm)(const float *, const float *, float, int, int, float *);
void LEVEL(quantize)(int, const float *, int, uint8_t *);
void LEVEL(write_kv)(const struct attention *, int, int, int, int);
void LEVEL(attend)(const struct attention *, const struct attention_task *, float *);
void LEVEL(merge_parts)(const struct attention *, int, int, float *);
void LEVEL(convolve)(const struct convolution *, int, int);
void LEVEL(delta)(const struct delta *, int, int, float *);
int32_t LEVEL(draw)(float *, int, const struct draw *, float *);

#define QUOTE(name) #name
#define NAME(level) QUOTE(level)

extern const struct kernels LEVEL(kernels);
const struct kernels LEVEL(kernels) = {
    .name = NAME(NEURON_LEVEL),
    .matmul = LEVEL(matmul),
    .rms_norm = LEVEL(rms_norm),
    .quantize = LEVEL(quantize),
    .write_kv = LEVEL(write_kv),
    .attend = LEVEL(attend),
    .merge_parts = LEVEL(merge_parts),
    .convolve = LEVEL(convolve),
    .delta = LEVEL(delta),
    .draw = LEVEL(draw),
};
