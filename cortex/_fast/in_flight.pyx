"""The requests of this process that have a node and no end yet."""

cimport cython


@cython.final
cdef class InFlight:
    """Counts them, by node and by model. ``on_release`` is called after each end."""

    def __cinit__(self):
        self.on_release = lambda: None
        self.by_node = {}
        self.by_model = {}

    cpdef Seat take(self, str node, str model):
        """Count a request at the moment its node is selected."""
        cdef Seat seat = Seat.__new__(Seat)
        self.by_node[node] = self.by_node.get(node, 0) + 1
        self.by_model[model] = self.by_model.get(model, 0) + 1
        seat.counts = self
        seat.node = node
        seat.model = model
        return seat


@cython.final
@cython.freelist(64)
cdef class Seat:
    """One counted request. Releasing it again does nothing."""

    cpdef object release(self):
        """Count the request no more."""
        cdef InFlight counts = self.counts
        if counts is not None:
            self.counts = None
            take_one(counts.by_node, self.node)
            take_one(counts.by_model, self.model)
            counts.on_release()


cdef int take_one(dict counts, str key) except -1:
    cdef Py_ssize_t count = counts[key] - 1
    if count:
        counts[key] = count
    else:
        del counts[key]
    return 0
