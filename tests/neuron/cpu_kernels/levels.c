/* Every level that this processor can run against the portable one, on random matrices and contexts: a program of its own,
 * so that it can be built for another processor and run in an emulator (test_arm.py). Prints its comparisons. */
#include "kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { ROWS = 48, COLUMNS = 96, MOST_X = 11, DIM = 32, TOKENS = 150, HEADS = 6, KV_HEADS = 2 };

static int failures;

static float uniform(void) { return (float)rand() / (float)RAND_MAX * 2.0f - 1.0f; }

static void compare(const char *level, const char *what, const float *found, const float *expected, int count) {
    float largest = 0, error = 0;
    for (int i = 0; i < count; i++) {
        largest = fmaxf(largest, fabsf(expected[i]));
        error = fmaxf(error, fabsf(found[i] - expected[i]));
    }
    int is_right = error <= 1e-5f * largest && largest > 0;
    failures += !is_right;
    printf("%s %s: error %g of %g%s\n", level, what, (double)error, (double)largest, is_right ? "" : " WRONG");
}

static void *zeros(size_t bytes) {
    void *memory = aligned_alloc(64, (bytes + 63) & ~(size_t)63);
    memset(memory, 0, (bytes + 63) & ~(size_t)63);
    return memory;
}

static void check_matmul(const struct kernels *level, const struct kernels *plain, int format) {
    uint8_t *data = zeros(ROWS / BLOCK_ROWS * block_bytes(format, COLUMNS));
    for (size_t i = 0; i < ROWS / BLOCK_ROWS * block_bytes(format, COLUMNS); i++) data[i] = (uint8_t)rand();
    for (int block = 0; block < ROWS / BLOCK_ROWS; block++)
        for (int g = 0; g < num_groups(format, COLUMNS); g++) {
            uint8_t *group = data + (size_t)block * block_bytes(format, COLUMNS) + (size_t)(g * group_bytes(format));
            for (int i = 0; i < 32; i++) {
                uint16_t half = float_to_half(uniform()), bf16 = float_to_bf16(uniform());
                float whole = uniform();
                if (format == W4) memcpy(group + 256 + 2 * i, &half, 2);
                if (format == IQ4 && i < 16) memcpy(group + 256 + 2 * i, &half, 2);
                if (format == FP4 && i < 16) memcpy(group + 256 + 2 * i, &bf16, 2);
                if (format == W8 && i < 16) memcpy(group + 512 + 2 * i, &half, 2);
                if (format == W16) memcpy(group + 2 * i, &bf16, 2);
                if (format == W32 && i < 16) memcpy(group + 4 * i, &whole, 4);
            }
        }
    struct matrix w = {data, NULL, ROWS, COLUMNS, format};
    float x[COLUMNS], y[2][MOST_X * ROWS];
    size_t stride = activation_bytes(format, COLUMNS);
    uint8_t *forms[2] = {zeros(MOST_X * stride), zeros(MOST_X * stride)};
    for (int row = 0; row < MOST_X; row++) {
        for (int i = 0; i < COLUMNS; i++) x[i] = uniform() * (i == 7 ? 40.0f : 1.0f);
        level->quantize(format, x, COLUMNS, forms[0] + (size_t)row * stride);
        plain->quantize(format, x, COLUMNS, forms[1] + (size_t)row * stride);
    }
    static const enum epilogue epilogues[] = {STORE, SWIGLU, GEGLU};
    for (int e = 0; e < 3; e++) {
        if (epilogues[e] != STORE && ROWS / BLOCK_ROWS % 2) w.rows = ROWS - BLOCK_ROWS;
        for (int i = 0; i < 2; i++) {
            memset(y[i], 0, sizeof y[i]);
            struct matmul task = {.w = &w, .x = forms[i], .x_stride = stride, .y = y[i], .y_stride = ROWS,
                                  .num_x = MOST_X, .epilogue = epilogues[e]};
            (i == 0 ? level : plain)->matmul(&task, 0, w.rows / BLOCK_ROWS);
        }
        char what[64];
        snprintf(what, sizeof what, "matmul, format %d, epilogue %d", format, e);
        compare(level->name, what, y[0], y[1], MOST_X * ROWS);
        w.rows = ROWS;
    }
    free(data);
    free(forms[0]);
    free(forms[1]);
}

static void check_attention(const struct kernels *level, const struct kernels *plain, enum kv_form form, int window) {
    int pages = (TOKENS + PAGE_TOKENS - 1) / PAGE_TOKENS, width = (HEADS + 2 * KV_HEADS) * DIM;
    size_t head = kv_page_bytes(form, DIM);
    float *qkv = zeros((size_t)(TOKENS * width) * 4), *angles[2] = {zeros(TOKENS * DIM * 2), zeros(TOKENS * DIM * 2)};
    float *out[2] = {zeros(HEADS * DIM * 4), zeros(HEADS * DIM * 4)}, *scratch = zeros(attention_scratch_floats(DIM) * 4);
    int32_t table[TOKENS / PAGE_TOKENS + 1];
    float scales[TOKENS];
    for (int i = 0; i < TOKENS; i++) scales[i] = 0.3f;
    for (int i = 0; i < TOKENS * width; i++) qkv[i] = uniform();
    for (int i = 0; i < TOKENS * DIM / 2; i++) {
        angles[0][i] = cosf((float)i);
        angles[1][i] = sinf((float)i);
    }
    for (int i = 0; i < pages; i++) table[i] = pages - 1 - i;
    for (int which = 0; which < 2; which++) {
        const struct kernels *kernels = which == 0 ? level : plain;
        uint8_t *cache = zeros((size_t)pages * 2 * KV_HEADS * head);
        struct attention a = {
            .qkv = qkv, .qkv_stride = (size_t)width, .key_column = HEADS * DIM, .value_column = (HEADS + KV_HEADS) * DIM,
            .cosine = angles[0], .sine = angles[1], .keys = cache, .values = cache + KV_HEADS * head,
            .page_stride = 2 * KV_HEADS * head, .head_stride = head, .out = out[which] - (TOKENS - 1) * HEADS * DIM,
            .out_stride = HEADS * DIM, .num_heads = HEADS, .num_kv_heads = KV_HEADS, .head_dim = DIM,
            .kv_form = form, .window_tokens = window, .eps = 1e-5f, .scales = scales,
        };
        for (int row = 0; row < TOKENS; row++)
            for (int kv = 0; kv < KV_HEADS; kv++)
                kernels->write_kv(&a, row, kv, table[row / PAGE_TOKENS], row % PAGE_TOKENS);
        for (int kv = 0; kv < KV_HEADS; kv++) {
            struct attention_task task = {
                .pages = table, .first_row = TOKENS - 1, .num_rows = 1, .position = TOKENS - 1,
                .first_head = kv * HEADS / KV_HEADS, .num_heads = HEADS / KV_HEADS, .kv_head = kv,
                .end_token = TOKENS, .segment_tokens = segment_tokens(TOKENS), .part = -1,
            };
            kernels->attend(&a, &task, scratch);
        }
        free(cache);
    }
    char what[64];
    snprintf(what, sizeof what, "attention, form %d, window %d", (int)form, window);
    compare(level->name, what, out[0], out[1], HEADS * DIM);
    free(qkv);
    free(angles[0]);
    free(angles[1]);
    free(out[0]);
    free(out[1]);
    free(scratch);
}

static void check_draw(const struct kernels *level, const struct kernels *plain) {
    enum { VOCAB = 1000, DRAWS = 20, WIDTH = 1008 };
    float given[WIDTH] = {0}, logits[WIDTH], scratch[WIDTH], tokens[2][DRAWS];
    for (int i = 0; i < VOCAB; i++) given[i] = 4.0f * uniform();
    for (int i = 0; i < DRAWS; i++)
        for (int which = 0; which < 2; which++) {
            struct draw draw = {.temperature = 0.7f, .top_p = 0.95, .top_k = 200, .min_p = 0.01f, .cap = 5.0f,
                                .uniform = (double)i / DRAWS};
            memcpy(logits, given, sizeof logits);
            tokens[which][i] = (float)(which == 0 ? level : plain)->draw(logits, VOCAB, &draw, scratch);
        }
    compare(level->name, "draw", tokens[0], tokens[1], DRAWS);
}

/* A prompt of two chunks and a token, behind its convolution. */
static void check_delta(const struct kernels *level, const struct kernels *plain, int is_tiled) {
    enum { KEYS = 2, VALUES = 6, KEY_DIM = 24, VALUE_DIM = 20, ROW_COUNT = 2 * CHUNK_TOKENS + 1 };
    enum { KEY = 48, VALUE = 96, Z = 224, STRENGTH = 352, DECAY = 368, STRIDE = 384, OUT = VALUES * VALUE_DIM, SLOT = 4 };
    struct delta_heads heads = {KEYS, VALUES, KEY_DIM, VALUE_DIM, is_tiled};
    size_t state_bytes = delta_state_floats(&heads) * 4;
    float *given = zeros(ROW_COUNT * STRIDE * 4), *scratch = zeros(delta_scratch_floats(&heads) * 4);
    float *x[2], *states[2], *out[2], *inputs[2], decay[VALUES], bias[VALUES], norm[32] = {0};
    float *weights = zeros(Z * SLOT * 4);
    struct matrix weight = {(const uint8_t *)weights, NULL, Z, SLOT, W32};
    int32_t cu_seqlens[] = {0, ROW_COUNT}, slots[] = {1};
    struct sequences sequences = {.count = 1, .cu_seqlens = cu_seqlens, .slots = slots};
    float gates[1];
    for (int i = 0; i < ROW_COUNT * STRIDE; i++) given[i] = uniform();
    for (int i = 0; i < Z * SLOT; i++) weights[i] = uniform();
    for (int i = 0; i < VALUE_DIM; i++) norm[i] = uniform();
    for (int i = 0; i < VALUES; i++) {
        decay[i] = -fabsf(uniform()) / 16;
        bias[i] = uniform();
    }
    for (int which = 0; which < 2; which++) {
        const struct kernels *kernels = which == 0 ? level : plain;
        x[which] = zeros(ROW_COUNT * STRIDE * 4);
        states[which] = zeros(state_bytes);
        out[which] = zeros(ROW_COUNT * OUT * 4);
        inputs[which] = zeros(2 * Z * (SLOT - 1) * 4);
        memcpy(x[which], given, ROW_COUNT * STRIDE * 4);
        for (int i = 0; i < Z * (SLOT - 1); i++) inputs[which][Z * (SLOT - 1) + i] = given[i];
        struct convolution convolution = {.weight = &weight, .x = x[which], .x_stride = STRIDE,
            .sequences = sequences, .inputs = (uint8_t *)inputs[which], .slot_bytes = Z * (SLOT - 1) * 4};
        kernels->convolve(&convolution, 0, Z / 16);
        struct delta delta = {.sequences = sequences, .heads = heads, .x = x[which], .x_stride = STRIDE, .key_column = KEY, .value_column = VALUE,
            .z_column = Z, .strength_column = STRENGTH, .decay_column = DECAY, .decay = decay, .bias = bias,
            .head_norm = norm, .eps = 1e-5f, .states = (uint8_t *)states[which] - state_bytes, .slot_bytes = state_bytes,
            .gates = (uint8_t *)gates, .out = out[which], .out_stride = OUT};
        for (int head = 0; head < KEYS; head++) kernels->delta(&delta, 0, head, scratch);
    }
    char what[64];
    snprintf(what, sizeof what, "delta, tiled %d: ", is_tiled);
    compare(level->name, strcat(what, "outputs"), out[0], out[1], ROW_COUNT * OUT);
    compare(level->name, "delta, state", states[0], states[1], (int)(state_bytes / 4));
    compare(level->name, "convolution, inputs", inputs[0], inputs[1], 2 * Z * (SLOT - 1));
    for (int i = 0; i < 2; i++) {
        free(x[i]);
        free(states[i]);
        free(out[i]);
        free(inputs[i]);
    }
    free(given);
    free(scratch);
    free(weights);
}

int main(void) {
    const struct kernels *plain = find_kernels("portable"), *level;
    for (int i = 0; (level = kernels_at(i)) != NULL; i++) {
        for (int format = W4; format <= W32; format++) check_matmul(level, plain, format);
        float x[COLUMNS], weight[COLUMNS], normed[2][COLUMNS];
        for (int j = 0; j < COLUMNS; j++) x[j] = uniform(), weight[j] = uniform();
        level->rms_norm(x, weight, 1e-5f, COLUMNS, COLUMNS, normed[0]);
        plain->rms_norm(x, weight, 1e-5f, COLUMNS, COLUMNS, normed[1]);
        compare(level->name, "rms_norm", normed[0], normed[1], COLUMNS);
        check_draw(level, plain);
        for (int is_tiled = 0; is_tiled < 2; is_tiled++) check_delta(level, plain, is_tiled);
        for (int form = KV_BFLOAT16; form <= KV_INT8; form++)
            for (int window = 0; window < 80; window += 40) check_attention(level, plain, (enum kv_form)form, window);
    }
    return failures != 0;
}
