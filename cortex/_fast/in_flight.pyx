"""Requests of this process that have a node and have not ended."""

cimport cython


@cython.final
cdef class InFlightRequests:
    """Counts of requests in flight, by node and by model. ``on_release`` is called after each end."""

    def __cinit__(self):
        self.on_release = lambda: None
        self.by_node = {}
        self.by_model = {}

    cpdef InFlightRequest add(self, str node, str model):
        """Count a request at the moment its node is selected."""
        cdef InFlightRequest in_flight_request = InFlightRequest.__new__(InFlightRequest)
        self.by_node[node] = self.by_node.get(node, 0) + 1
        self.by_model[model] = self.by_model.get(model, 0) + 1
        in_flight_request.counts = self
        in_flight_request.node = node
        in_flight_request.model = model
        return in_flight_request


@cython.final
@cython.freelist(64)
cdef class InFlightRequest:
    """Counted request; a second release does nothing."""

    cpdef object release(self):
        """Remove the request from the counts."""
        cdef InFlightRequests counts = self.counts
        if counts is not None:
            self.counts = None
            decrement(counts.by_node, self.node)
            decrement(counts.by_model, self.model)
            counts.on_release()


cdef int decrement(dict counts, str key) except -1:
    cdef Py_ssize_t count = counts[key] - 1
    if count:
        counts[key] = count
    else:
        del counts[key]
    return 0
