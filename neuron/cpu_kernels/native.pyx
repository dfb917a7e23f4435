"""CPU kernels and step executor for Python: arrays in, no copies, no GIL while they run.

The preconditions of the C code are checked here: lengths, and that a step is within the model's bounds. A Model holds
references to the memory of its pointers. Over 450 lines: pool, matrices and model share C structs, which separate
extensions would have to export.
"""

cimport cython
from libc.stdint cimport int32_t, uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset


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

cdef extern from "step.h" nogil:
    cdef struct layer:
        const float *input_norm
        const float *post_norm
        const float *attention_out_norm
        const float *mlp_out_norm
        const float *qk_norm
        matrix qkv[3]
        matrix output, gate_up, down
        int kind
    int MAX_TABLES, MAX_KINDS
    cdef struct model:
        const kernels *kernels
        pool *pool
        int threads, num_layers, hidden, num_heads, num_kv_heads, head_dim, intermediate, vocab
        float eps, embedding_scale, attention_scale, logit_cap
        int gelu
        kv_form kv_form
        int max_rows, max_sequences, max_sampled
        int num_kinds
        int window_tokens[2]
        const float *ropes[2]
        float query_growth
        int query_tokens
        const float *norm
        matrix embedding, head
        layer *layers
        int num_tables
        int table_layers[2]
        uint8_t *caches[2]
        uint8_t *arena
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
    size_t c_page_bytes "page_bytes"(const model *model, int table)
    size_t c_arena_bytes "arena_bytes"(const model *model)

cdef extern from "multi_step.h" nogil:
    cdef struct multi_step:
        int num_steps
        int32_t *ids
        const int32_t *stops
        int num_stops
        int fd
        int32_t *scratch
    int run_multi_step(const model *model, const step *step, const multi_step *multi)


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
    """Packed matrix ``[rows, columns]``, padded with zeros to 16 rows, and a bias of the same rows."""

    cdef matrix _matrix
    cdef object _kept

    def __cinit__(self, const unsigned char[::1] packed not None, int format, int rows, int columns, const float[::1] bias=None):
        if not W4 <= format <= W32 or rows < 1 or columns < 1 or (format <= W8 and columns % 32):
            raise ValueError(f"no matrix [{rows}, {columns}] of format {format}")
        padded = round_up(rows, BLOCK_ROWS)
        if packed.shape[0] != padded // BLOCK_ROWS * <Py_ssize_t>block_bytes(format, columns):
            raise ValueError(f"{packed.shape[0]} bytes are no matrix [{rows}, {columns}] of format {format}")
        if bias is not None and bias.shape[0] != padded:
            raise ValueError(f"a bias of {bias.shape[0]} for {padded} rows")
        self._kept = (packed, bias)
        self._matrix.data = &packed[0]
        self._matrix.bias = &bias[0] if bias is not None else NULL
        self._matrix.rows, self._matrix.columns, self._matrix.format = padded, columns, format

    def unpack_row(self, int row, float[::1] out not None):
        """Write row ``row`` as float32 into ``out`` ``[columns]``."""
        if not 0 <= row < self._matrix.rows or out.shape[0] != self._matrix.columns:
            raise ValueError(f"no row {row} of {out.shape[0]} elements")
        unpack_row(&self._matrix, row, &out[0])


cdef const kernels *table_of(str level) except NULL:
    cdef const kernels *table = find_kernels(level.encode())
    if table == NULL:
        raise ValueError(f"{level!r} is not among this processor's levels: {', '.join(levels())}")
    return table


def linear(str level not None, Matrix matrix not None, const float[:, ::1] x not None, float[:, ::1] y not None, str mode="store"):
    """Multiply ``x`` ``[T, columns]`` into ``y`` ``[T, rows]``: ``store``, ``add``; ``swiglu``, ``geglu`` into ``[T, rows / 2]``.

    ``x`` is first converted to the form that the matrix multiplies, as in a step. ``rows`` is padded to 16.
    """
    cdef const kernels *table = table_of(level)
    cdef matmul_task task
    cdef int i
    task.epilogue = {"store": STORE, "add": ADD, "swiglu": SWIGLU, "geglu": GEGLU}[mode]
    width = matrix._matrix.rows // 2 if mode in ("swiglu", "geglu") else matrix._matrix.rows
    if x.shape[1] != matrix._matrix.columns or y.shape[0] != x.shape[0] or y.shape[1] != width or not x.shape[0]:
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


def arena_bytes(
    *, int hidden, int num_heads, int num_kv_heads, int head_dim, int intermediate, int max_rows, int max_sequences,
    int max_sampled, int threads, bint has_out_norms, int num_kinds,
):
    """Return a bound on the arena of a model of these sizes, whatever form its matrices have."""
    cdef model m
    cdef layer only
    cdef float norm = 1
    memset(&m, 0, sizeof(model))
    memset(&only, 0, sizeof(layer))
    m.layers, m.num_layers, m.threads, m.num_kinds = &only, 1, threads, num_kinds
    m.hidden, m.num_heads, m.num_kv_heads, m.head_dim = hidden, num_heads, num_kv_heads, head_dim
    m.intermediate, m.max_rows, m.max_sequences, m.max_sampled = intermediate, max_rows, max_sequences, max_sampled
    # Floats take the most: they are multiplied as they are.
    m.head.format = only.qkv[0].format = only.output.format = only.gate_up.format = only.down.format = W32
    only.qkv[0].columns = only.gate_up.columns = hidden
    only.output.columns, only.down.columns = num_heads * head_dim, intermediate
    only.mlp_out_norm = &norm if has_out_norms else NULL
    return c_arena_bytes(&m)


@cython.final
cdef class Model:
    """Weights, cache and buffers of a model for the executor."""

    cdef model _model
    cdef Pool _pool
    cdef list _kept
    cdef object _caches
    cdef object _arena
    cdef int32_t *_scratch
    cdef Py_ssize_t _num_pages[2]

    def __cinit__(
        self, Pool pool not None, str level not None, *, int num_layers, int hidden, int num_heads, int num_kv_heads,
        int head_dim, int intermediate, int vocab, float eps, str kv_dtype not None, int max_rows, int max_sequences,
        float embedding_scale=1.0, float attention_scale=0.0, bint gelu=False, tuple windows not None=(0,),
        float logit_cap=0.0, int max_sampled, bint has_window_table=False, float query_growth=0.0, int query_tokens=1,
    ):
        sizes = (
            num_layers, hidden, num_heads, num_kv_heads, head_dim, intermediate, vocab, max_rows, max_sequences, max_sampled
        )
        if min(sizes) < 1 or max_sampled < max_sequences or num_heads % num_kv_heads or head_dim % 2 or head_dim > 1024 or query_tokens < 1:
            raise ValueError(f"no model of sizes {sizes}")
        if not 0 < len(windows) <= MAX_KINDS or min(windows) < 0 or not has_window_table <= sum(map(bool, windows)) < 2:
            raise ValueError(f"no model with the windows {windows}")
        memset(&self._model, 0, sizeof(model))
        self._pool = pool
        self._kept = []
        m = &self._model
        m.kernels, m.pool, m.threads = table_of(level), pool._pool, pool_threads(pool._pool)
        m.num_layers, m.hidden, m.num_heads, m.num_kv_heads = num_layers, hidden, num_heads, num_kv_heads
        m.head_dim, m.intermediate, m.vocab, m.eps = head_dim, intermediate, vocab, eps
        m.kv_form = kv_form_of(kv_dtype)
        m.max_rows, m.max_sequences, m.max_sampled = max_rows, max_sequences, max_sampled
        m.embedding_scale, m.attention_scale = embedding_scale, attention_scale or head_dim ** -0.5
        m.gelu, m.logit_cap, m.query_growth, m.query_tokens = gelu, logit_cap, query_growth, query_tokens
        m.num_kinds = <int>len(windows)
        for kind, window in enumerate(windows):
            m.window_tokens[kind] = window
        m.num_tables = 1 + has_window_table
        m.layers = <layer *>calloc(num_layers, sizeof(layer))
        self._scratch = <int32_t *>calloc(max_sequences, (3 + MAX_TABLES) * sizeof(int32_t))
        if m.layers == NULL or self._scratch == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self._model.layers)
        free(self._scratch)

    cdef const float *_vector(self, const float[::1] values, Py_ssize_t length) except NULL:
        if values.shape[0] != length:
            raise ValueError(f"a vector of {values.shape[0]}, {length} wanted")
        self._kept.append(values)
        return &values[0]

    cdef matrix _checked(self, Matrix found, int rows, int columns) except *:
        if found._matrix.rows != round_up(rows, 16) or found._matrix.columns != columns:
            raise ValueError(f"a matrix [{found._matrix.rows}, {found._matrix.columns}], [{rows}, {columns}] wanted")
        self._kept.append(found)
        return found._matrix

    def set_ends(
        self, Matrix embedding not None, Matrix head not None, norm not None, tuple ropes not None,
    ):
        """Set the embedding, the final norm and the head, and the rotary embedding of each kind of layers.

        ``norm`` is padded to 16. A rotary embedding is ``[head_dim]``: the angles of pairs, and the factors of pairs.
        """
        m = &self._model
        m.embedding = self._checked(embedding, m.vocab, m.hidden)
        m.head = self._checked(head, m.vocab, m.hidden)
        m.norm = self._vector(norm, round_up(m.hidden, 16))
        if len(ropes) != m.num_kinds:
            raise ValueError(f"{len(ropes)} rotary embeddings for {m.num_kinds} kinds of layers")
        for kind, rope in enumerate(ropes):
            m.ropes[kind] = self._vector(rope, m.head_dim)

    def set_layer(
        self, int number, *, input_norm not None, post_norm not None, qk_norm, Matrix query not None,
        Matrix key not None, Matrix value not None, Matrix output not None, Matrix gate_up not None, Matrix down not None,
        attention_out_norm=None, mlp_out_norm=None, int kind=0,
    ):
        """Set a layer. Norms are padded to 16; ``gate_up`` alternates blocks of 16 rows of gate and up."""
        m = &self._model
        if not 0 <= number < m.num_layers:
            raise ValueError(f"no layer {number}")
        found = &m.layers[number]
        queries, keys = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
        found.input_norm = self._vector(input_norm, round_up(m.hidden, 16))
        found.post_norm = self._vector(post_norm, round_up(m.hidden, 16))
        found.attention_out_norm = found.mlp_out_norm = found.qk_norm = NULL
        if (attention_out_norm is None) != (mlp_out_norm is None):
            raise ValueError("the outputs of attention and MLP are normalised both, or neither")
        if attention_out_norm is not None:
            found.attention_out_norm = self._vector(attention_out_norm, round_up(m.hidden, 16))
            found.mlp_out_norm = self._vector(mlp_out_norm, round_up(m.hidden, 16))
        if not 0 <= kind < m.num_kinds:
            raise ValueError(f"no kind {kind} of layers")
        found.kind = kind
        if qk_norm is not None:
            found.qk_norm = self._vector(qk_norm, (m.num_heads + m.num_kv_heads) * m.head_dim)
        found.qkv[0] = self._checked(query, queries, m.hidden)
        found.qkv[1] = self._checked(key, keys, m.hidden)
        found.qkv[2] = self._checked(value, keys, m.hidden)
        forms = {max(part._matrix.format, <int>W8) for part in (query, key, value)}
        if len(forms) != 1:
            raise ValueError("query, key and value multiply different forms of the same activations")
        found.output = self._checked(output, m.hidden, queries)
        found.gate_up = self._checked(gate_up, 2 * round_up(m.intermediate, 16), m.hidden)
        found.down = self._checked(down, m.hidden, m.intermediate)

    @property
    def page_bytes(self):
        """Sizes in bytes of a page of each table over its layers; known once all layers are set."""
        place_layers(&self._model)
        return tuple(c_page_bytes(&self._model, table) for table in range(self._model.num_tables))

    @property
    def arena_bytes(self):
        """Size of a step's arena in bytes; known once all matrices are set."""
        return c_arena_bytes(&self._model)

    def attach(self, tuple caches not None, unsigned char[::1] arena not None):
        """Set the cache of each page table (whole pages) and the arena, zeroed and aligned to 64 bytes."""
        cdef unsigned char[::1] cache
        m = &self._model
        sizes = self.page_bytes
        if m.head.data == NULL or any(m.layers[i].input_norm == NULL for i in range(m.num_layers)):
            raise ValueError("weights are missing")
        if len({m.layers[i].mlp_out_norm == NULL for i in range(m.num_layers)}) > 1:
            raise ValueError("some layers normalise their outputs, and others do not")
        if len(caches) != m.num_tables or any(len(each) < size or (size and len(each) % size) for each, size in zip(caches, sizes)) or arena.shape[0] < <Py_ssize_t>c_arena_bytes(m):
            raise ValueError(f"caches of {[len(each) for each in caches]} bytes and an arena of {arena.shape[0]} do not fit")
        for table, cache in enumerate(caches):
            if <size_t>&cache[0] % 64 or <size_t>&arena[0] % 64:
                raise ValueError("cache and arena must be aligned to 64 bytes")
            # A table without layers has any page.
            self._num_pages[table] = cache.shape[0] // sizes[table] if sizes[table] else 1 << 27
            m.caches[table] = &cache[0]
        self._caches, self._arena = caches, arena
        m.arena = &arena[0]

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
    ):
        """Compute a step of B sequences and T tokens (see StepPlan) and write ``finite`` ``[B]``, else 0.

        The R sampled rows write their likeliest tokens to ``ids`` ``[R]``, -1 where there is none; or, with ``logits``
        ``[R, V padded to 16]``, their logits there. With ``draws`` as well, tokens are drawn from these, which are
        overwritten: temperature, top-p and min-p (float64 ``[R]``), top-k (int32), seeds (uint64) and counters (int32)
        as in :class:`neuron.engine.sampler.Draws`, and scratch, float32 ``[threads, V padded]``; rows with a
        temperature below 0 are skipped. The E ``hidden_rows`` write their last hidden states to ``hidden``
        ``[E, hidden]``.

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
