"""CPU kernels and step executor for Python: arrays in, no copies, no GIL while they run.

The preconditions of the C code are checked here: lengths, and that a step is within the model's bounds. A Model holds
references to the memory of its pointers. Over 450 lines: pool, matrices and model share C structs, which separate
extensions would have to export.
"""

cimport cython
from libc.stdint cimport int32_t, uint8_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcmp, memset


cdef extern from "formats.h" nogil:
    cdef struct matrix:
        const uint8_t *data
        const float *bias
        int32_t rows
        int32_t columns
        int32_t format
    int W4, W8, W16, W32, BLOCK_ROWS
    int round_up(int value, int unit)
    size_t block_bytes(int format, int columns)
    size_t activation_bytes(int format, int columns)

cdef extern from "pack.h" nogil:
    cdef struct packing:
        const uint8_t *from_ "from"
        size_t row_bytes
        int kind, rows, columns
        uint8_t *to
        size_t to_stride
        int format
    int c_can_pack "can_pack"(int kind, int format)
    size_t c_row_bytes "row_bytes"(int kind, int columns)
    void pack_blocks(const packing *packing, int first_block, int end_block)
    void unpack_row(const matrix *matrix, int row, float *out)

cdef extern from "pool.h" nogil:
    cdef struct pool:
        pass
    pool *pool_create(int num_threads)
    void pool_destroy(pool *pool)
    int pool_threads(const pool *pool)
    void pool_run(pool *pool, void (*work)(void *, int) noexcept nogil, void *argument)

cdef extern from "kernels.h" nogil:
    enum epilogue:
        STORE, ADD, SWIGLU, GEGLU, ARGMAX
    cdef struct matmul_task "matmul":
        const matrix *w
        const uint8_t *x
        size_t x_stride
        float *y
        size_t y_stride
        int num_x
        int into_l2
        epilogue epilogue
    cdef struct token_draw "draw":
        float cap, temperature, min_p
        double top_p
        int32_t top_k
        double uniform
    cdef struct kernels:
        const char *name
        void matmul(const matmul_task *task, int first_block, int end_block) noexcept nogil
        void rms_norm(const float *x, const float *weight, float eps, int n, int n_padded, float *out) noexcept nogil
        void quantize(int format, const float *x, int n, uint8_t *out) noexcept nogil
        int32_t draw(float *logits, int n, const token_draw *draw, float *scratch) noexcept nogil
    const kernels *find_kernels(const char *name)
    const kernels *kernels_at(int index)

    enum kv_form:
        KV_BFLOAT16, KV_FLOAT32, KV_INT8
    size_t c_kv_page_bytes "kv_page_bytes"(kv_form form, int head_dim)

    cdef struct delta_heads:
        int num_keys, num_values, key_dim, value_dim, is_tiled
    int MAX_CONVOLUTION

cdef extern from "step.h" nogil:
    cdef struct attention_kind:
        int num_heads, num_kv_heads, head_dim, window_tokens, table
        float scale, query_growth
        int query_tokens, is_gated
        const float *rope
    cdef struct attention_layer:
        int kind
        const float *qk_norm
        matrix qkv[3]
        matrix output
    cdef struct mlp_layer:
        matrix gate_up, down
        int is_gelu
    cdef struct delta_layer:
        delta_heads heads
        matrix qkv[3]
        matrix z
        matrix gates[2]
        matrix convolution[3]
        const float *decay
        const float *bias
        const float *head_norm
        matrix output
        int max_drafts
    enum layer_kind:
        ATTENTION, GATED_MLP, GATED_DELTA
    cdef struct layer:
        layer_kind kind
        float eps
        const float *norm
        const float *out_norm
        attention_layer attention
        mlp_layer mlp
        delta_layer delta
    int MAX_TABLES, MAX_KINDS
    cdef struct model:
        const kernels *kernels
        pool *pool
        int threads, hidden, vocab
        float eps, embedding_scale, logit_cap
        kv_form kv_form
        int max_rows, max_sequences, max_sampled
        const float *norm
        matrix embedding, head
        int num_kinds
        attention_kind kinds[8]
        int num_layers
        layer *layers
        int num_tables
        size_t page_bytes[4]
        uint8_t *caches[4]
        size_t slot_bytes
        uint8_t *states
        uint8_t *arena
        int into_l2
    cdef struct drawing "draws":
        const double *temperature
        const double *top_p
        const double *min_p
        const int32_t *top_k
        const int32_t *counters
        const uint64_t *seeds
        float *scratch
    cdef struct step:
        int num_tokens, num_sequences, num_sampled, num_hidden, page_columns
        const int32_t *token_ids
        const int32_t *positions
        const int32_t *slot_mappings
        const int32_t *cu_seqlens
        const int32_t *page_tables
        const int32_t *context_lens
        const int32_t *state_slots
        const int32_t *replays
        int first_drafting, end_drafting
        const int32_t *sampled
        const int32_t *hidden_rows
        float *logits
        const drawing *draws
        int32_t index
        int32_t *ids
        int32_t *finite
        float *hidden
    double c_uniform "uniform"(uint64_t seed, uint64_t counter)
    void place_layers(model *model)
    size_t c_arena_bytes "arena_bytes"(const model *model)
    void probe_prefetch(model *model)

cdef extern from "multi_step.h" nogil:
    cdef struct multi_step:
        int num_steps
        int32_t *ids
        const int32_t *stops
        int num_stops
        int fd
        int32_t *scratch
    int run_multi_step(const model *model, const step *step, const multi_step *multi)


class UnsupportedError(ValueError):
    """Model that the kernels cannot run; the message says why."""


def levels():
    """Return the dispatch levels that this processor can run, best first."""
    found = []
    cdef const kernels *table = kernels_at(0)
    while table != NULL:
        found.append(table.name.decode())
        table = kernels_at(<int>len(found))
    return tuple(found)


def packed_bytes(int format, int rows, int columns):
    """Return the bytes of a packed matrix ``[rows, columns]``."""
    return round_up(rows, BLOCK_ROWS) // BLOCK_ROWS * block_bytes(format, columns)


def can_pack(int kind, int format):
    """Whether a GGUF tensor kind can be packed as ``format`` from its own blocks."""
    return bool(c_can_pack(kind, format))


@cython.final
cdef class Pool:
    """Thread pool that runs steps: ``num_threads`` with the caller."""

    cdef pool *_pool

    def __cinit__(self, int num_threads):
        if num_threads < 1:
            raise ValueError(f"{num_threads} threads cannot run anything")
        self._pool = pool_create(num_threads)
        if self._pool == NULL:
            raise MemoryError(f"no pool of {num_threads} threads")

    def __dealloc__(self):
        if self._pool != NULL:
            pool_destroy(self._pool)

    @property
    def num_threads(self):
        """Number of threads that run a step."""
        return pool_threads(self._pool)


cdef struct pack_work:
    packing packing
    pool *pool


cdef void pack_share(void *argument, int thread) noexcept nogil:
    cdef pack_work *work = <pack_work *>argument
    cdef int blocks = round_up(work.packing.rows, BLOCK_ROWS) // BLOCK_ROWS, threads = pool_threads(work.pool)
    pack_blocks(&work.packing, <int>(<long>blocks * thread // threads), <int>(<long>blocks * (thread + 1) // threads))


def pack(
    Pool pool not None,
    const unsigned char[::1] stored not None,
    int kind,
    int rows,
    int columns,
    unsigned char[::1] packed not None,
    int format,
    *,
    int first_block=0,
    int block_step=1,
):
    """Pack a stored matrix ``[rows, columns]`` of a GGUF ``kind`` into blocks of ``packed``, on all threads.

    Its first block becomes ``first_block``, the next ``block_step`` further. Raises ValueError if lengths do not fit.
    """
    cdef pack_work work
    cdef size_t bytes = c_row_bytes(kind, columns), block = block_bytes(format, columns)
    cdef Py_ssize_t blocks = round_up(rows, BLOCK_ROWS) // BLOCK_ROWS
    if rows < 1 or columns < 1 or not W4 <= format <= W32 or not c_can_pack(kind, format) or bytes == 0:
        raise ValueError(f"kind {kind} of [{rows}, {columns}] cannot be packed as format {format}")
    if format <= W8 and columns % 32:
        raise ValueError(f"{columns} columns are no whole groups of 32")
    if stored.shape[0] != <Py_ssize_t>bytes * rows:
        raise ValueError(f"{stored.shape[0]} bytes stored, {bytes * rows} wanted")
    if first_block < 0 or block_step < 1 or packed.shape[0] < ((blocks - 1) * block_step + first_block + 1) * <Py_ssize_t>block:
        raise ValueError(f"{packed.shape[0]} bytes cannot hold {blocks} blocks")
    work.pool = pool._pool
    work.packing.from_ = &stored[0]
    work.packing.row_bytes = bytes
    work.packing.kind, work.packing.rows, work.packing.columns = kind, rows, columns
    work.packing.to = &packed[first_block * <Py_ssize_t>block]
    work.packing.to_stride = block * block_step
    work.packing.format = format
    # Safety: the views are held by this frame; each thread writes blocks of its own.
    with nogil:
        pool_run(work.pool, pack_share, &work)


@cython.final
cdef class Matrix:
    """Packed matrix ``[rows, columns]``, padded with zeros to 16 rows, and a bias of the same rows.

    Without ``packed`` it is a shape alone, from which the memory of a model that is not loaded follows.
    """

    cdef matrix _matrix
    cdef object _kept

    def __cinit__(self, const unsigned char[::1] packed, int format, int rows, int columns, const float[::1] bias=None):
        if not W4 <= format <= W32 or rows < 1 or columns < 1:
            raise ValueError(f"no matrix [{rows}, {columns}] of format {format}")
        if format <= W8 and columns % 32:
            raise UnsupportedError(f"quantised rows of {columns} elements are no whole groups of 32")
        padded = round_up(rows, BLOCK_ROWS)
        if packed is not None and packed.shape[0] != padded // BLOCK_ROWS * <Py_ssize_t>block_bytes(format, columns):
            raise ValueError(f"{packed.shape[0]} bytes are no matrix [{rows}, {columns}] of format {format}")
        if bias is not None and bias.shape[0] != padded:
            raise ValueError(f"a bias of {bias.shape[0]} for {padded} rows")
        self._kept = (packed, bias)
        self._matrix.data = &packed[0] if packed is not None else NULL
        self._matrix.bias = &bias[0] if bias is not None else NULL
        self._matrix.rows, self._matrix.columns, self._matrix.format = padded, columns, format

    def unpack_row(self, int row, float[::1] out not None):
        """Write row ``row`` as float32 into ``out`` ``[columns]``."""
        if self._matrix.data == NULL or not 0 <= row < self._matrix.rows or out.shape[0] != self._matrix.columns:
            raise ValueError(f"no row {row} of {out.shape[0]} elements")
        unpack_row(&self._matrix, row, &out[0])


cdef const kernels *table_of(str level) except NULL:
    cdef const kernels *table = find_kernels(level.encode())
    if table == NULL:
        raise ValueError(f"{level!r} is not among this processor's levels: {', '.join(levels())}")
    return table


def linear(
    str level not None, Matrix matrix not None, const float[:, ::1] x not None, float[:, ::1] y not None,
    str mode="store", *, bint into_l2=False,
):
    """Multiply ``x`` ``[T, columns]`` into ``y`` ``[T, rows]``: ``store``, ``add``; ``swiglu``, ``geglu`` into ``[T, rows / 2]``.

    ``x`` is first converted to the form that the matrix multiplies, as in a step. ``rows`` is padded to 16.
    Weights are prefetched past the caches or, with ``into_l2``, into the second level.
    """
    cdef const kernels *table = table_of(level)
    cdef matmul_task task
    cdef int i
    task.into_l2 = into_l2
    task.epilogue = {"store": STORE, "add": ADD, "swiglu": SWIGLU, "geglu": GEGLU}[mode]
    width = matrix._matrix.rows // 2 if mode in ("swiglu", "geglu") else matrix._matrix.rows
    if matrix._matrix.data == NULL or x.shape[1] != matrix._matrix.columns or y.shape[0] != x.shape[0] or y.shape[1] != width or not x.shape[0]:
        raise ValueError(f"x [{x.shape[0]}, {x.shape[1]}] and y [{y.shape[0]}, {y.shape[1]}] do not fit")
    task.w = &matrix._matrix
    task.num_x = <int>x.shape[0]
    task.x_stride = activation_bytes(matrix._matrix.format, matrix._matrix.columns)
    task.y = &y[0, 0]
    task.y_stride = y.shape[1]
    cdef uint8_t *activations = <uint8_t *>calloc(task.num_x, task.x_stride)
    if activations == NULL:
        raise MemoryError
    task.x = activations
    # Safety: the views and the buffer are this frame's.
    with nogil:
        for i in range(task.num_x):
            table.quantize(matrix._matrix.format, &x[i, 0], matrix._matrix.columns, activations + i * task.x_stride)
        table.matmul(&task, 0, matrix._matrix.rows // BLOCK_ROWS)
    free(activations)


def rms_norm(str level not None, const float[::1] x not None, const float[::1] weight not None, float eps, int count, float[::1] out not None):
    """Normalise the first ``count`` elements of ``x`` ``[count padded to 16]``, whose rest is zero, into ``out``."""
    cdef int padded = round_up(count, 16)
    if count < 1 or x.shape[0] != padded or weight.shape[0] != padded or out.shape[0] != padded:
        raise ValueError(f"vectors of {padded} wanted")
    table_of(level).rms_norm(&x[0], &weight[0], eps, count, padded, &out[0])


def draw(
    str level not None, float[::1] logits not None, int count, float[::1] scratch not None, *, float temperature=1.0,
    int top_k=0, double top_p=1.0, float min_p=0.0, double uniform=0.5, float cap=0.0,
):
    """Return the token that ``uniform`` in [0, 1) draws from ``count`` logits, whose row is padded to 16 and overwritten.

    Return -1 if a logit is not finite. ``scratch`` is as long as the row.
    """
    cdef token_draw how
    if count < 1 or logits.shape[0] != round_up(count, 16) or scratch.shape[0] != logits.shape[0]:
        raise ValueError(f"{logits.shape[0]} and {scratch.shape[0]} are no rows for {count} logits")
    how.temperature, how.top_k, how.top_p, how.min_p = temperature, top_k, top_p, min_p
    how.uniform, how.cap = uniform, cap
    return table_of(level).draw(&logits[0], count, &how, &scratch[0])


def uniform(uint64_t seed, uint64_t counter):
    """Return the number in [0, 1) with which a step draws the token ``counter`` of a sequence with ``seed``."""
    return c_uniform(seed, counter)


cdef kv_form kv_form_of(str dtype) except *:
    return {"bfloat16": KV_BFLOAT16, "float32": KV_FLOAT32, "int8": KV_INT8}[dtype]


def kv_page_bytes(str kv_dtype not None, int head_dim):
    """Return the bytes of a page of the keys of one head, or of its values."""
    return c_kv_page_bytes(kv_form_of(kv_dtype), head_dim)


@cython.final
cdef class Model:
    """Layers, cache and buffers of a model for the executor.

    Layers are added in the order of computation. Vectors are padded with zeros to 16. A model without a pool, for steps on
    ``threads``, has sizes alone. Raises :class:`UnsupportedError` for layers that no kernel runs, ``ValueError`` for
    weights that do not fit.
    """

    cdef model _model
    cdef Pool _pool
    cdef list _kept
    cdef tuple _windows
    cdef object _attached
    cdef int32_t *_scratch
    cdef Py_ssize_t _num_pages[4]
    cdef Py_ssize_t _num_slots
    cdef int _max_drafts

    def __cinit__(
        self, Pool pool, str level not None, *, int hidden, int vocab, float eps, str kv_dtype not None, int max_rows,
        int max_sequences, int max_sampled, float embedding_scale=1.0, float logit_cap=0.0, tuple windows not None=(),
        int threads=0,
    ):
        """``windows`` are those of the page tables behind table 0."""
        sizes = (hidden, vocab, max_rows, max_sequences, max_sampled)
        if min(sizes) < 1 or max_sampled < max_sequences or (pool is None) != (threads > 0):
            raise ValueError(f"no model of sizes {sizes}")
        if len(windows) >= MAX_TABLES or min(windows, default=1) < 1 or len(set(windows)) < len(windows):
            raise ValueError(f"no page tables of the windows {windows}")
        memset(&self._model, 0, sizeof(model))
        self._pool, self._kept, self._windows = pool, [], windows
        m = &self._model
        m.kernels = table_of(level)
        m.pool = pool._pool if pool is not None else NULL
        m.threads = pool_threads(pool._pool) if pool is not None else threads
        m.hidden, m.vocab, m.eps = hidden, vocab, eps
        m.kv_form = kv_form_of(kv_dtype)
        m.max_rows, m.max_sequences, m.max_sampled = max_rows, max_sequences, max_sampled
        m.embedding_scale, m.logit_cap = embedding_scale, logit_cap
        m.num_tables = 1 + <int>len(windows)
        self._max_drafts = 64
        self._scratch = <int32_t *>calloc(max_sequences, (3 + MAX_TABLES) * sizeof(int32_t))
        if self._scratch == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self._model.layers)
        free(self._scratch)

    cdef const float *_vector(self, const float[::1] values, int length) except? NULL:
        if values is None:
            return NULL
        if values.shape[0] != round_up(length, 16):
            raise ValueError(f"a vector of {values.shape[0]}, {length} padded to 16 wanted")
        self._kept.append(values)
        return &values[0]

    cdef matrix _checked(self, Matrix found, int rows, int columns) except *:
        if found._matrix.rows != round_up(rows, 16) or found._matrix.columns != columns:
            raise ValueError(f"a matrix [{found._matrix.rows}, {found._matrix.columns}], [{rows}, {columns}] wanted")
        self._kept.append(found)
        return found._matrix

    cdef int _side_by_side(self, matrix *to, tuple found, tuple rows, int columns) except -1:
        """Set matrices that multiply the same activations."""
        if len(found) != len(rows):
            raise ValueError(f"{len(found)} matrices, {len(rows)} wanted")
        for i, (each, count) in enumerate(zip(found, rows)):
            to[i] = self._checked(each, count, columns)
        if len({max(to[i].format, <int>W8) for i in range(<int>len(rows))}) > 1:
            raise ValueError("matrices side by side multiply different forms of the same activations")
        return 0

    cdef layer *_added(self, layer_kind kind, norm, out_norm, float eps) except NULL:
        m = &self._model
        cdef layer *layers = <layer *>realloc(m.layers, (m.num_layers + 1) * sizeof(layer))
        if layers == NULL:
            raise MemoryError
        m.layers = layers
        found = &layers[m.num_layers]
        memset(found, 0, sizeof(layer))
        found.kind, found.eps = kind, eps
        if norm is None:
            raise ValueError("a layer has no norm")
        found.norm, found.out_norm = self._vector(norm, m.hidden), self._vector(out_norm, m.hidden)
        if m.num_layers and (layers[0].out_norm == NULL) != (found.out_norm == NULL):
            raise UnsupportedError("some layers normalise their outputs, and others do not")
        return found

    cdef int _kind(self, const attention_kind *wanted) except -1:
        """Return the number of a kind of attention, which is added if it is new."""
        m = &self._model
        for i in range(m.num_kinds):
            known = &m.kinds[i]
            if (
                known.num_heads == wanted.num_heads and known.num_kv_heads == wanted.num_kv_heads
                and known.head_dim == wanted.head_dim and known.window_tokens == wanted.window_tokens
                and known.scale == wanted.scale and known.query_growth == wanted.query_growth
                and known.query_tokens == wanted.query_tokens and known.is_gated == wanted.is_gated
                and memcmp(known.rope, wanted.rope, wanted.head_dim * sizeof(float)) == 0
            ):
                return i
        if m.num_kinds == MAX_KINDS:
            raise UnsupportedError(f"more than {MAX_KINDS} kinds of attention")
        m.kinds[m.num_kinds] = wanted[0]
        m.num_kinds += 1
        return m.num_kinds - 1

    def add_attention(
        self, *, norm, float eps, tuple qkv not None, Matrix output not None, rope not None, int num_heads,
        int num_kv_heads, int head_dim, float scale, int window_tokens=0, bint gated=False, float query_growth=0.0,
        int query_tokens=1, qk_norm=None, out_norm=None,
    ):
        """Add attention. ``rope`` ``[head_dim]`` has the angles of pairs, and the factors of pairs."""
        cdef attention_kind kind
        if head_dim > 1024:
            raise UnsupportedError(f"heads of {head_dim} dimensions; at most 1024 are supported")
        if min(num_heads, num_kv_heads, head_dim, query_tokens) < 1 or num_heads % num_kv_heads or head_dim % 2 or window_tokens < 0:
            raise ValueError(f"no attention of {num_heads} heads of {head_dim}, {num_kv_heads} of keys")
        kind.num_heads, kind.num_kv_heads, kind.head_dim = num_heads, num_kv_heads, head_dim
        kind.window_tokens, kind.scale, kind.is_gated = window_tokens, scale, gated
        kind.query_growth, kind.query_tokens = query_growth, query_tokens
        kind.table = 1 + <int>self._windows.index(window_tokens) if window_tokens in self._windows else 0
        kind.rope = self._vector(rope, head_dim)
        m = &self._model
        queries, keys = num_heads * head_dim, num_kv_heads * head_dim
        found = self._added(ATTENTION, norm, out_norm, eps)
        found.attention.qk_norm = self._vector(qk_norm, (num_heads + num_kv_heads) * head_dim)
        self._side_by_side(found.attention.qkv, qkv, (2 * queries if gated else queries, keys, keys), m.hidden)
        found.attention.output = self._checked(output, m.hidden, queries)
        found.attention.kind = self._kind(&kind)
        m.num_layers += 1

    def add_mlp(self, *, norm, float eps, Matrix gate_up not None, Matrix down not None, int width, bint gelu=False, out_norm=None):
        """Add a gated MLP; ``gate_up`` alternates blocks of 16 rows of gate and up."""
        m = &self._model
        found = self._added(GATED_MLP, norm, out_norm, eps)
        found.mlp.gate_up = self._checked(gate_up, 2 * round_up(width, 16), m.hidden)
        found.mlp.down = self._checked(down, m.hidden, width)
        found.mlp.is_gelu = gelu
        m.num_layers += 1

    def add_gated_delta(
        self, *, norm, float eps, tuple qkv not None, tuple z not None, tuple gates not None, tuple convolution not None,
        decay not None, bias not None, head_norm not None, Matrix output not None, int num_key_heads,
        int num_value_heads, int key_dim, int value_dim, int width, int max_drafts=0, bint tiled=False, out_norm=None,
    ):
        """Add a gated delta net, ``gates`` being strengths, then decays; ``convolution`` has the format W32.

        A sequence has at most ``max_drafts`` draft tokens in a step.
        """
        if not 0 <= max_drafts < 64 or min(num_key_heads, num_value_heads, key_dim, value_dim) < 1 or num_value_heads % num_key_heads or width < 2:
            raise ValueError(f"no recurrence of {num_value_heads} heads, {num_key_heads} of keys")
        if width > MAX_CONVOLUTION:
            raise UnsupportedError(f"a convolution of {width} tokens; at most {MAX_CONVOLUTION} are supported")
        m = &self._model
        found = self._added(GATED_DELTA, norm, out_norm, eps)
        own = &found.delta
        own.heads.num_keys, own.heads.num_values, own.heads.is_tiled = num_key_heads, num_value_heads, tiled
        own.heads.key_dim, own.heads.value_dim = key_dim, value_dim
        own.max_drafts = max_drafts
        keys, values = num_key_heads * key_dim, num_value_heads * value_dim
        self._side_by_side(own.qkv, qkv, (keys, keys, values), m.hidden)
        self._side_by_side(&own.z, z, (values,), m.hidden)
        self._side_by_side(own.gates, gates, (num_value_heads, num_value_heads), m.hidden)
        for i, (each, rows) in enumerate(zip(convolution, (keys, keys, values), strict=True)):
            own.convolution[i] = self._checked(each, rows, width)
            if own.convolution[i].format != W32:
                raise ValueError("a convolution has float32 weights")
        own.decay, own.bias = self._vector(decay, num_value_heads), self._vector(bias, num_value_heads)
        own.head_norm = self._vector(head_norm, value_dim)
        own.output = self._checked(output, m.hidden, values)
        self._max_drafts = min(self._max_drafts, max_drafts)
        m.num_layers += 1

    def set_ends(self, Matrix embedding not None, Matrix head not None, norm not None):
        """Set the embedding, the final norm and the head."""
        m = &self._model
        m.embedding = self._checked(embedding, m.vocab, m.hidden)
        m.head = self._checked(head, m.vocab, m.hidden)
        m.norm = self._vector(norm, m.hidden)

    cdef int _place(self) except -1:
        if self._model.num_layers == 0 or self._model.norm == NULL:
            raise ValueError("layers are missing")
        place_layers(&self._model)
        return 0

    @property
    def page_bytes(self):
        """Sizes in bytes of a page of each table over its layers; known once all layers are added."""
        self._place()
        return tuple(self._model.page_bytes[table] for table in range(self._model.num_tables))

    @property
    def state_bytes(self):
        """Size in bytes of the states of all layers of a sequence; known once all layers are added."""
        self._place()
        return self._model.slot_bytes

    @property
    def arena_bytes(self):
        """Size of a step's arena in bytes; known once all layers are added."""
        self._place()
        return c_arena_bytes(&self._model)

    def attach(self, tuple caches not None, const unsigned char[::1] states, unsigned char[::1] arena not None):
        """Set the cache of each page table (whole pages), the state slots and the arena, zeroed and aligned to 64 bytes."""
        cdef unsigned char[::1] cache
        m = &self._model
        sizes = self.page_bytes
        if self._pool is None or any((<Matrix?>each)._matrix.data == NULL for each in self._kept if isinstance(each, Matrix)):
            raise ValueError("weights are missing")
        if len(caches) != m.num_tables or any(len(each) < size or (size and len(each) % size) for each, size in zip(caches, sizes)) or arena.shape[0] < <Py_ssize_t>c_arena_bytes(m):
            raise ValueError(f"caches of {[len(each) for each in caches]} bytes and an arena of {arena.shape[0]} do not fit")
        num_bytes = states.shape[0] if states is not None else 0
        if num_bytes % m.slot_bytes or num_bytes < m.slot_bytes if m.slot_bytes else num_bytes:
            raise ValueError(f"{num_bytes} bytes are no states of {m.slot_bytes} bytes")
        for table, cache in enumerate(caches):
            if <size_t>&cache[0] % 64 or <size_t>&arena[0] % 64:
                raise ValueError("cache and arena must be aligned to 64 bytes")
            # A table without layers has any page.
            self._num_pages[table] = cache.shape[0] // sizes[table] if sizes[table] else 1 << 27
            m.caches[table] = &cache[0]
        if m.slot_bytes:
            if <size_t>&states[0] % 64:
                raise ValueError("states must be aligned to 64 bytes")
            m.states = <uint8_t *>&states[0]
            self._num_slots = num_bytes // m.slot_bytes
        self._attached = caches, states, arena
        m.arena = &arena[0]
        # Safety: no step runs before this returns.
        with nogil:
            probe_prefetch(m)

    def run(
        self,
        const int32_t[::1] token_ids not None,
        const int32_t[::1] positions not None,
        const int32_t[:, ::1] slot_mappings not None,
        const int32_t[::1] cu_seqlens not None,
        const int32_t[:, :, ::1] page_tables not None,
        const int32_t[::1] context_lens not None,
        const int32_t[::1] sampled not None,
        const int32_t[::1] hidden_rows not None,
        float[:, ::1] logits,
        int32_t[::1] ids not None,
        int32_t[::1] finite not None,
        float[:, ::1] hidden,
        *,
        tuple draws=None,
        int32_t[:, ::1] later=None,
        const int32_t[::1] stops=None,
        int channel_fd=-1,
        const int32_t[::1] state_slots=None,
        const int32_t[::1] replays=None,
        int num_decodes=0,
        int num_drafting=0,
    ):
        """Compute a step of B sequences and T tokens (see StepPlan) and write ``finite`` ``[B]``, else 0.

        The R sampled rows write their likeliest tokens to ``ids`` ``[R]``, -1 where there is none; or, with ``logits``
        ``[R, V padded to 16]``, their logits there. With ``draws`` as well, tokens are drawn from these, which are
        overwritten: temperature, top-p and min-p (float64 ``[R]``), top-k (int32), seeds (uint64) and counters (int32)
        as in :class:`neuron.engine.sampler.Draws`, and scratch, float32 ``[threads, V padded]``; rows with a
        temperature below 0 are skipped. The E ``hidden_rows`` write their last hidden states to ``hidden``
        ``[E, hidden]``. ``state_slots`` ``[B]``, all different, are the states that the sequences continue; slot 0 is
        of no sequence. The ``num_drafting`` sequences behind the ``num_decodes`` first have draft tokens: no state advances
        by these, and ``replays`` ``[B]`` of them are the accepted ones, by which states advance first.

        With ``later`` ``[N - 1, B]``, where every sequence has one row and that is sampled, the step is done up to N
        times, each with the tokens of the one before it: returns how often. It ends behind one that goes wrong, samples
        one of ``stops``, or finds something to read at ``channel_fd``; ``finite`` is the last one's.
        """
        cdef step s
        cdef multi_step steps
        cdef drawing how
        cdef const double[::1] temperature, top_p, min_p
        cdef const int32_t[::1] top_k, counters
        cdef const uint64_t[::1] seeds
        cdef float[:, ::1] scratch
        cdef int done
        m = &self._model
        cdef Py_ssize_t T = token_ids.shape[0], B = context_lens.shape[0], R = sampled.shape[0], E = hidden_rows.shape[0]
        cdef Py_ssize_t i, j, table
        cdef Py_ssize_t more = later.shape[0] if later is not None else 0
        cdef const int32_t[::1] rows
        if m.arena == NULL:
            raise ValueError("the model has no cache yet")
        if not 0 < T <= m.max_rows or not 0 < B <= m.max_sequences or R > m.max_sampled:
            raise ValueError(
                f"a step of {T} tokens of {B} sequences, {R} sampled; at most {m.max_rows}, {m.max_sequences}, {m.max_sampled}"
            )
        if positions.shape[0] != T or slot_mappings.shape[1] != T or cu_seqlens.shape[0] != B + 1 or page_tables.shape[1] != B or finite.shape[0] != B or ids.shape[0] != R:
            raise ValueError("the arrays of a step differ in length")
        if slot_mappings.shape[0] != m.num_tables or page_tables.shape[0] != m.num_tables:
            raise ValueError(f"{page_tables.shape[0]} page tables, {m.num_tables} wanted")
        if logits is not None and (logits.shape[0] != R or logits.shape[1] != m.head.rows):
            raise ValueError(f"logits [{logits.shape[0]}, {logits.shape[1]}], [{R}, {m.head.rows}] wanted")
        if (E or hidden is not None) and (hidden is None or hidden.shape[0] != E or hidden.shape[1] != m.hidden):
            raise ValueError(f"hidden states of {E} rows of {m.hidden} have no place")
        if draws is not None:
            temperature, top_p, min_p, top_k, seeds, counters, scratch = draws
            if logits is None or {part.shape[0] for part in draws[:6]} != {R}:
                raise ValueError(f"{R} rows cannot be drawn")
            if scratch.shape[0] < pool_threads(m.pool) or scratch.shape[1] != m.head.rows:
                raise ValueError(f"no room to draw in: [{scratch.shape[0]}, {scratch.shape[1]}]")
            for i in range(R if more else 0):
                if temperature[i] < 0:
                    raise ValueError(f"row {i} is left, so that nothing can follow it")
        if more and ((logits is not None and draws is None) or E or T != B or R != B or later.shape[1] != B):
            raise ValueError(f"{T} tokens of {B} sequences, {R} sampled, cannot be done {more + 1} times")
        if m.slot_bytes and (state_slots is None or state_slots.shape[0] != B):
            raise ValueError(f"{B} sequences have no states to continue")
        if num_decodes < 0 or num_drafting < 0 or (more and num_drafting) or (replays is not None and replays.shape[0] != B):
            raise ValueError(f"{B} sequences cannot have these draft tokens")
        for i in range(B if m.slot_bytes else 0):
            if not 0 < state_slots[i] < self._num_slots:
                raise ValueError(f"state slot {state_slots[i]} is out of range")
            drafts = cu_seqlens[i + 1] - cu_seqlens[i] - 1 if num_decodes <= i < num_decodes + num_drafting else 0
            if not 0 <= drafts <= self._max_drafts or (replays is not None and not 0 <= replays[i] <= self._max_drafts):
                raise ValueError(f"sequence {i} has more than {self._max_drafts} draft tokens")
            for j in range(i):
                if state_slots[j] == state_slots[i]:
                    raise ValueError(f"sequences {j} and {i} continue one state")
        for i in range(T):
            if not 0 <= token_ids[i] < m.vocab:
                raise ValueError(f"token {token_ids[i]} is out of range")
            for table in range(m.num_tables):
                if not 0 <= slot_mappings[table, i] < self._num_pages[table] * 16:
                    raise ValueError(f"slot {slot_mappings[table, i]} is out of range")
        for i in range(B):
            if cu_seqlens[i + 1] <= cu_seqlens[i] or not 0 < context_lens[i] <= page_tables.shape[2] * 16 - more:
                raise ValueError(f"sequence {i} has no tokens, or more than its pages hold")
            if positions[cu_seqlens[i + 1] - 1] != context_lens[i] - 1 or positions[cu_seqlens[i]] < 0:
                raise ValueError(f"sequence {i} does not end at its last token")
            for table in range(m.num_tables):
                for j in range((context_lens[i] + more + 15) // 16):
                    if not 0 <= page_tables[table, i, j] < self._num_pages[table]:
                        raise ValueError(f"page {page_tables[table, i, j]} is out of range")
        if cu_seqlens[0] != 0 or cu_seqlens[B] != T:
            raise ValueError("the sequences do not cover the step")
        for rows in (sampled, hidden_rows):
            for i in range(rows.shape[0]):
                if not (rows[i - 1] if i else -1) < rows[i] < T:
                    raise ValueError("rows are not in rising order")
        s.num_tokens, s.num_sequences, s.num_sampled, s.num_hidden = <int>T, <int>B, <int>R, <int>E
        s.page_columns = <int>page_tables.shape[2]
        s.token_ids, s.positions, s.cu_seqlens = &token_ids[0], &positions[0], &cu_seqlens[0]
        s.slot_mappings, s.page_tables, s.context_lens = &slot_mappings[0, 0], &page_tables[0, 0, 0], &context_lens[0]
        s.state_slots = &state_slots[0] if m.slot_bytes else NULL
        s.replays = &replays[0] if replays is not None else NULL
        s.first_drafting, s.end_drafting = num_decodes, num_decodes + num_drafting
        s.sampled = &sampled[0] if R else NULL
        s.logits = &logits[0, 0] if logits is not None and R else NULL
        s.draws, s.index = NULL, 0
        if draws is not None and R:
            how.temperature, how.top_p, how.min_p = &temperature[0], &top_p[0], &min_p[0]
            how.top_k, how.seeds, how.counters = &top_k[0], &seeds[0], &counters[0]
            how.scratch = &scratch[0, 0]
            s.draws = &how
        s.ids = &ids[0] if R else NULL
        s.finite = &finite[0]
        s.hidden_rows = &hidden_rows[0] if E else NULL
        s.hidden = &hidden[0, 0] if E else NULL
        steps.num_steps, steps.fd, steps.scratch = <int>more + 1, channel_fd, self._scratch
        steps.ids = &later[0, 0] if more else NULL
        steps.num_stops = <int>stops.shape[0] if stops is not None else 0
        steps.stops = &stops[0] if steps.num_stops else NULL
        # Safety: the plan's arrays are held by this frame, weights, cache, arena and scratch by self; the engine runs one
        # step of a model at a time, and the pool one call. The descriptor is only asked whether it can be read.
        with nogil:
            done = run_multi_step(m, &s, &steps)
        return done
