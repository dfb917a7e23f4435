/* A node that costs less than any gateway in front of it: what the gateways of this bench ask.
 *
 *     mock PORT COUNT PATH=FILE...
 *
 * listens on COUNT ports of 127.0.0.1 from PORT on, in one thread. A GET of a PATH is answered with the FILE's bytes as
 * JSON, `GET /counts` with what was served; a chat request has a marker (shared.h) that selects the answer. A
 * stream is chunked, an SSE event a chunk, with the usage comment of a neuron at its end if the request wants one
 * (x-cortex-report-usage). SSE events that are not paced leave BATCH at a time, as an engine's steps leave them.
 *
 * It trusts its clients: a request that it cannot read ends the process with a message, so that a run fails. One
 * file, since one compiler call builds it without a build system.
 */
#define _GNU_SOURCE
#include "shared.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MAX_REQUEST = 512 * 1024, OUT_BYTES = 8 * 1024, BATCH = 8, MAX_EVENTS = 512, MAX_PAGES = 16 };

struct connection {
    int fd;
    int is_listener;
    char *request; /* MAX_REQUEST, of which untouched pages cost nothing */
    size_t request_len, head_len, body_len;
    const char *out; /* what the socket did not take yet: in buffer, or a page */
    size_t out_len;
    int waits_for_writable;
    char buffer[OUT_BYTES];
    unsigned sse_event, num_sse_events; /* of the stream being answered, which ends where they are equal */
    int streams, reports_usage;
    uint64_t pace_ns, due_ns;
    size_t place; /* in the heap of paced streams, or in the list of the others; see `listed` */
    enum { NOWHERE, IN_HEAP, IN_LIST } listed;
};

struct page {
    const char *path;
    char *answer;
    size_t len;
};

static struct page pages[MAX_PAGES];
static size_t num_pages;
static struct {
    uint64_t requests, streams, sse_events, connections, cut;
} counts;
static int epoll_fd;

/* Streams that are due at a time, as a heap; and streams that go on as soon as they can. */
static struct connection **heap, **list;
static size_t heap_len, list_len, max_fds;

#define CHAT_REQUEST "POST /v1/chat/completions "
static const char stream_head[] = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
#define CHUNK(delta, finish)                                                                                           \
    "data: {\"id\":\"chatcmpl-0123456789abcdef\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\","    \
    "\"choices\":[{\"index\":0,\"delta\":{" delta "},\"finish_reason\":" finish "}]}\n\n"
static const char role_chunk[] = CHUNK("\"role\":\"assistant\",\"content\":\"\"", "null");
static const char text_chunk[] = CHUNK("\"content\":\" #NNNNTTTTTTTTTTTTTTTT\"", "null");
static const char stop_chunk[] = CHUNK("", "\"stop\"");
static const char usage_chunk[] = ": usage {\"prompt_tokens\":10,\"completion_tokens\":50,\"cached_tokens\":0}\n\n";
static const char done_chunk[] = "data: [DONE]\n\n";
static size_t stamp_at; /* in text_chunk */

static char answer[1024]; /* to a request that is not streamed, whole */
static size_t answer_len, marker_at;

/* ------------------------------------------------------------------------------------- the heap and the list */

static void heap_set(size_t place, struct connection *c)
{
    heap[place] = c;
    c->place = place;
}

static void heap_fix(size_t place)
{
    struct connection *c = heap[place];
    for (; place && heap[(place - 1) / 2]->due_ns > c->due_ns; place = (place - 1) / 2)
        heap_set(place, heap[(place - 1) / 2]);
    for (size_t child; (child = 2 * place + 1) < heap_len; place = child) {
        if (child + 1 < heap_len && heap[child + 1]->due_ns < heap[child]->due_ns)
            child++;
        if (heap[child]->due_ns >= c->due_ns)
            break;
        heap_set(place, heap[child]);
    }
    heap_set(place, c);
}

static void unlist(struct connection *c)
{
    if (c->listed == IN_HEAP) {
        struct connection *last = heap[--heap_len];
        if (last != c) {
            heap_set(c->place, last);
            heap_fix(c->place);
        }
    } else if (c->listed == IN_LIST) {
        struct connection *last = list[--list_len];
        list[c->place] = last;
        last->place = c->place;
    }
    c->listed = NOWHERE;
}

/* Have a stream's next SSE events sent when they are due. */
static void enlist(struct connection *c)
{
    if (c->pace_ns) {
        c->listed = IN_HEAP;
        heap_set(heap_len++, c);
        heap_fix(c->place);
    } else {
        c->listed = IN_LIST;
        c->place = list_len;
        list[list_len++] = c;
    }
}

/* --------------------------------------------------------------------------------------------------- sending */

static void watch(struct connection *c, int waits_for_writable)
{
    if (c->waits_for_writable == waits_for_writable)
        return;
    struct epoll_event event = {.events = EPOLLIN | (waits_for_writable ? EPOLLOUT : 0), .data.ptr = c};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &event))
        die("mock: epoll_ctl");
    c->waits_for_writable = waits_for_writable;
}

static void leave(struct connection *c)
{
    if (c->streams)
        counts.cut++;
    unlist(c);
    close(c->fd);
    free(c->request);
    c->request = NULL;
    c->fd = -1; /* freed at the end of the iteration: an event of this iteration may still name it */
}

/* Send what is left in `out`; return 0 if the connection is gone or must wait until it is writable. */
static int flush(struct connection *c)
{
    while (c->out_len) {
        ssize_t n = send(c->fd, c->out, c->out_len, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno == EAGAIN)
                watch(c, 1);
            else
                leave(c);
            return 0;
        }
        c->out += n;
        c->out_len -= (size_t)n;
    }
    watch(c, 0);
    return 1;
}

static char *put(char *to, const char *data, size_t len)
{
    memcpy(to, data, len);
    return to + len;
}

static char *put_chunk(char *to, const char *data, size_t len)
{
    to += sprintf(to, "%zx\r\n", len);
    return put(put(to, data, len), "\r\n", 2);
}

/* Send a stream's head before its first SSE event, the SSE events that are due, and after the last one its end. */
static void send_sse_events(struct connection *c)
{
    unsigned now = c->num_sse_events - c->sse_event;
    if (now > (c->pace_ns ? 1 : BATCH))
        now = c->pace_ns ? 1 : BATCH;
    char *to = c->buffer;
    if (!c->sse_event) {
        to = put(to, stream_head, sizeof stream_head - 1);
        to = put_chunk(to, role_chunk, sizeof role_chunk - 1);
    }
    uint64_t time = now_ns();
    for (; now; now--, c->sse_event++, counts.sse_events++) {
        to = put_chunk(to, text_chunk, sizeof text_chunk - 1);
        char *stamp = to - 2 - (sizeof text_chunk - 1) + stamp_at;
        put_hex(stamp, c->sse_event, NUMBER_DIGITS);
        put_hex(stamp + NUMBER_DIGITS, time, TIME_DIGITS);
    }
    if (c->sse_event == c->num_sse_events) {
        to = put_chunk(to, stop_chunk, sizeof stop_chunk - 1);
        to = put_chunk(to, done_chunk, sizeof done_chunk - 1);
        if (c->reports_usage)
            to = put_chunk(to, usage_chunk, sizeof usage_chunk - 1);
        to = put(to, "0\r\n\r\n", 5);
        c->streams = 0;
        unlist(c);
    }
    c->out = c->buffer;
    c->out_len = (size_t)(to - c->buffer);
    if (!flush(c) && c->listed == IN_LIST)
        unlist(c); /* until it is writable again: this thread shares its core with the load */
}

/* ------------------------------------------------------------------------------------------------- receiving */

static void begin_chat(struct connection *c, const char *head, const char *body)
{
    const char *marker = memchr(body, '#', c->body_len);
    uint64_t id, num_sse_events, pace;
    if (!marker || body + c->body_len - marker < MARKER_BYTES || !get_hex(marker + 1, ID_DIGITS, &id) ||
        !get_hex(marker + 1 + ID_DIGITS, EVENTS_DIGITS, &num_sse_events) ||
        !get_hex(marker + 1 + ID_DIGITS + EVENTS_DIGITS, PACE_DIGITS, &pace)) {
        fprintf(stderr, "mock: no marker in a body of %zu bytes: %.*s\n", c->body_len, 400, body);
        exit(2);
    }
    counts.requests++;
    if (!num_sse_events) {
        memcpy(answer + marker_at, marker, MARKER_BYTES);
        c->out = memcpy(c->buffer, answer, answer_len);
        c->out_len = answer_len;
        flush(c);
        return;
    }
    counts.streams++;
    c->streams = 1;
    c->reports_usage = memmem(head, c->head_len, "x-cortex-report-usage", 21) != NULL;
    c->sse_event = 0;
    c->num_sse_events = (unsigned)num_sse_events;
    c->pace_ns = pace * PACE_UNIT_NS;
    c->due_ns = now_ns();
    enlist(c);
}

static void answer_page(struct connection *c, const char *path, size_t len)
{
    for (size_t i = 0; i < num_pages; i++) {
        if (strlen(pages[i].path) == len && !memcmp(pages[i].path, path, len)) {
            c->out = pages[i].answer;
            c->out_len = pages[i].len;
            flush(c);
            return;
        }
    }
    char body[256] = "{\"error\":{\"message\":\"no such path\",\"type\":\"invalid_request_error\",\"code\":\"unknown_url\"}}";
    int status = 404;
    if (len == 7 && !memcmp(path, "/counts", 7)) {
        status = 200;
        sprintf(body, "{\"requests\":%lu,\"streams\":%lu,\"sse_events\":%lu,\"connections\":%lu,\"cut\":%lu}", counts.requests,
                counts.streams, counts.sse_events, counts.connections, counts.cut);
    }
    c->out_len = (size_t)sprintf(c->buffer,
                                 "HTTP/1.1 %d Status\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n%s",
                                 status, strlen(body), body);
    c->out = c->buffer;
    flush(c);
}

/* Find the end of the head that begins a request, and how long its body is. */
static int read_head(struct connection *c)
{
    char *end = memmem(c->request, c->request_len, "\r\n\r\n", 4);
    if (!end)
        return 0;
    c->head_len = (size_t)(end - c->request) + 4;
    c->body_len = 0;
    end[2] = 0; /* the last line of the head ends it for strcasestr */
    char *length = strcasestr(c->request, "\r\ncontent-length:");
    if (length)
        c->body_len = strtoul(length + 17, NULL, 10);
    else if (strcasestr(c->request, "\r\ntransfer-encoding:")) {
        fprintf(stderr, "mock: a chunked request: %s\n", c->request);
        exit(2);
    }
    end[2] = '\r';
    if (c->head_len + c->body_len > MAX_REQUEST) {
        fprintf(stderr, "mock: a request of %zu bytes\n", c->head_len + c->body_len);
        exit(2);
    }
    return 1;
}

/* Answer the request that is complete, if one is and the one before it has been answered. */
static void answer_next(struct connection *c)
{
    while (c->fd >= 0 && !c->streams && !c->out_len) {
        if (!c->head_len && !read_head(c))
            return;
        if (c->request_len < c->head_len + c->body_len)
            return;
        if (!memcmp(c->request, CHAT_REQUEST, sizeof CHAT_REQUEST - 1)) {
            begin_chat(c, c->request, c->request + c->head_len);
        } else if (!memcmp(c->request, "GET ", 4) || !memcmp(c->request, "POST ", 5)) {
            const char *path = strchr(c->request, ' ') + 1;
            answer_page(c, path, strcspn(path, " ?"));
        } else {
            leave(c); /* sglang-router asks in HTTP/2 too, to see which one it gets */
        }
        if (c->fd < 0)
            return;
        size_t used = c->head_len + c->body_len;
        memmove(c->request, c->request + used, c->request_len - used);
        c->request_len -= used;
        c->head_len = 0;
    }
}

static void receive(struct connection *c)
{
    ssize_t n = recv(c->fd, c->request + c->request_len, MAX_REQUEST - c->request_len, 0);
    if (n < 0 && errno == EAGAIN)
        return;
    if (n <= 0) {
        leave(c);
        return;
    }
    c->request_len += (size_t)n;
    answer_next(c);
}

static void accept_all(struct connection *listener)
{
    int fd;
    while ((fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        /* By default it grows to some megabytes here: the packets of the loopback are large. */
        int on = 1, few = 64 * 1024;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &few, sizeof few);
        struct connection *c = calloc(1, sizeof *c);
        c->fd = fd;
        c->request = malloc(MAX_REQUEST);
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
        if (!c->request || (size_t)fd >= max_fds || epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event))
            die("mock: a new connection");
        counts.connections++;
    }
    if (errno != EAGAIN && errno != ECONNABORTED)
        die("mock: accept");
}

/* --------------------------------------------------------------------------------------------------- the loop */

static void serve(void)
{
    static struct epoll_event events[MAX_EVENTS];
    static struct connection *gone[MAX_EVENTS];
    for (;;) {
        struct timespec wait = {0, 0}, *timeout = &wait;
        if (!list_len && heap_len) {
            uint64_t now = now_ns(), due = heap[0]->due_ns;
            uint64_t ns = due > now ? due - now : 0;
            wait.tv_sec = (time_t)(ns / 1000000000u);
            wait.tv_nsec = (long)(ns % 1000000000u);
        } else if (!list_len) {
            timeout = NULL;
        }
        int num_events = epoll_pwait2(epoll_fd, events, MAX_EVENTS, timeout, NULL);
        if (num_events < 0 && errno != EINTR)
            die("mock: epoll_pwait2");
        size_t num_gone = 0;
        for (int i = 0; i < num_events; i++) {
            struct connection *c = events[i].data.ptr;
            if (c->is_listener) {
                accept_all(c);
                continue;
            }
            if (events[i].events & EPOLLOUT) {
                if (flush(c) && c->streams && c->listed == NOWHERE)
                    enlist(c);
                else if (c->fd >= 0)
                    answer_next(c);
            }
            if (c->fd >= 0 && events[i].events & ~EPOLLOUT)
                receive(c);
            if (c->fd < 0)
                gone[num_gone++] = c;
        }
        while (num_gone)
            free(gone[--num_gone]);
        /* From the end: a stream that ends here is replaced by one that was served already. */
        for (size_t i = list_len; i-- > 0;) {
            struct connection *c = list[i];
            send_sse_events(c);
            if (c->fd >= 0)
                answer_next(c);
            else
                free(c);
        }
        for (uint64_t now = now_ns(); heap_len && heap[0]->due_ns <= now;) {
            struct connection *c = heap[0];
            c->due_ns += c->pace_ns;
            heap_fix(0);
            if (c->out_len)
                continue; /* the reader is behind: the SSE event is made in a later iteration */
            send_sse_events(c);
            if (c->fd >= 0)
                answer_next(c);
            else
                free(c);
        }
    }
}

static void listen_at(int port)
{
    struct connection *c = calloc(1, sizeof *c);
    int on = 1;
    c->is_listener = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(c->fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    if (bind(c->fd, (struct sockaddr *)&address, sizeof address) || listen(c->fd, 4096) ||
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event))
        die("mock: listen");
}

static void read_page(char *argument)
{
    char *equals = strchr(argument, '=');
    if (!equals || num_pages == MAX_PAGES) {
        fprintf(stderr, "mock: %s is no PATH=FILE, or one too many\n", argument);
        exit(2);
    }
    *equals = 0;
    FILE *file = fopen(equals + 1, "rb");
    static char body[64 * 1024];
    size_t len = file ? fread(body, 1, sizeof body, file) : 0;
    if (!len || len == sizeof body)
        die(equals + 1);
    fclose(file);
    struct page *page = &pages[num_pages++];
    page->path = argument;
    page->answer = malloc(len + 128);
    page->len = (size_t)sprintf(page->answer,
                                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n", len);
    memcpy(page->answer + page->len, body, len);
    page->len += len;
}

static void make_texts(void)
{
    static const char before[] = "{\"id\":\"chatcmpl-0123456789abcdef\",\"object\":\"chat.completion\",\"created\":1,"
                                 "\"model\":\"m\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"";
    static const char after[] = ANSWER_WORDS "\"},\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":10,"
                                             "\"completion_tokens\":50,\"total_tokens\":60}}";
    size_t len = sizeof before - 1 + MARKER_BYTES + sizeof after - 1;
    answer_len = (size_t)sprintf(
        answer, "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n%s%*s%s", len, before,
        MARKER_BYTES, "", after);
    marker_at = answer_len - (sizeof after - 1) - MARKER_BYTES;
    stamp_at = (size_t)(strchr(text_chunk, '#') - text_chunk) + 1;
}

int main(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "usage: mock PORT COUNT PATH=FILE...\n");
        return 2;
    }
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    max_fds = files.rlim_cur < 65536 ? files.rlim_cur : 65536; /* a descriptor is below it, so a list of it holds all */
    heap = calloc(max_fds, sizeof *heap);
    list = calloc(max_fds, sizeof *list);
    make_texts();
    for (int i = 3; i < argc; i++)
        read_page(argv[i]);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    for (int i = 0; i < atoi(argv[2]); i++)
        listen_at(atoi(argv[1]) + i);
    serve();
}
