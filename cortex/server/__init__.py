"""Adapter of Granian, the server, and all that exists because of it.

* Granian queues what a stream is sent without limit, over RSGI. :mod:`cortex.server.send_window` bounds that by what
  the client's host has acknowledged, and :mod:`cortex._fast.response_writer` counts the bytes and coalesces the writes,
  as Granian wakes a thread for each.
* It reports a client's disconnect only when asked, which costs more than most answers do:
  :mod:`cortex._fast.watches` asks late.
* It panics at some characters of headers: :mod:`cortex.server.rsgi_io` leaves them out. It sends the body of a reply to
  HEAD over HTTP/2, and takes one message of a WebSocket at a time.
* It stops by closing connections that were accepted and not yet read, and kept-alive ones whose next request is on its
  way: :mod:`cortex.server.ending` stops accepting first.
* A worker that it forks ignores SIGTERM until the application is imported: :mod:`cortex.server.worker_signals`.
* It loses a cancellation that meets a piece of a body over ASGI: ``GRACE_S`` in :mod:`cortex.request_body`.
"""
