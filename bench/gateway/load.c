/* Keeps a number of connections to a gateway busy, and reads every answer to its last byte.
 *
 *     load PORT CONNECTIONS [--seconds S] [--warm S] [--answers N] [--body BYTES] [--tools N] [--sse-events N]
 *          [--pace MS] [--late MS] [--key KEY] [--spread MS] [--stall]
 *
 * Each connection asks, waits for the whole answer and asks again, for --seconds after --warm, or --answers times. With
 * --sse-events the answers are streams of so many SSE events, --pace apart; --spread lets the connections begin over a
 * time instead of at once. An SSE event that is read --late after it was sent counts as late. An answer counts if its status is 200, it is whole, and its text is that of its own request:
 * the marker and the words of an answer that is not streamed; each SSE event of a stream once and in its order, and the
 * end mark. The first one that is wrong ends the run with a message and status 1: a gateway that fails is not fast.
 * With --stall the connections ask for a stream, and do not read it until the process gets SIGUSR1.
 *
 * Prints JSON. Rates and times are of what ended after the warm-up; the `total_` counts are of all of the run, as a CPU
 * time that was taken around it is. An SSE event's delay is the time since the mock sent it, by the clock of the
 * machine. One file, since one compiler call builds it without a build system.
 */
#define _GNU_SOURCE
#include "shared.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

enum { HEAD_BYTES = 8 * 1024, TEXT_BYTES = 64 * 1024, READ_BYTES = 64 * 1024, MAX_EVENTS = 512 };
enum { GRACE_S = 30 };

/* Where a connection is in the answer that it reads. */
enum state { IDLE, HEAD, BODY, CHUNK_SIZE, CHUNK, CHUNK_END, TRAILER };

struct connection {
    int fd;
    unsigned number, num_answers;
    char marker[MARKER_BYTES];
    size_t sent; /* of the request */
    int waits_for_writable;
    enum state state;
    int is_chunked;
    uint64_t left; /* of the body, or of the chunk */
    size_t head_len, text_len;
    uint64_t asked_ns;
    unsigned sse_event;
    int is_done; /* the stream's end mark was there */
    char head[HEAD_BYTES];
    char text[TEXT_BYTES]; /* the body, or the part of a line of a stream that is there */
};

/* Samples in nanoseconds, up to four seconds. */
struct samples {
    uint32_t *values;
    size_t len, capacity;
};

static struct {
    int port;
    unsigned connections, answers, sse_events, tools;
    double seconds, warm, pace_ms, spread_ms, late_ms;
    size_t body;
    const char *key;
    int stall;
} options = {.seconds = 1, .body = 300, .late_ms = 35};

static char *before, *after; /* the request, around its marker */
static size_t before_len, after_len;
static int epoll_fd;
static uint64_t begin_ns, end_ns; /* what ends between them counts */
static unsigned num_open;
static struct {
    uint64_t answers, sse_events, late, reconnects;
    uint64_t total_answers, total_sse_events;
} counts;
static struct samples latencies, firsts, delays;
static uint64_t last_ns; /* when the last answer ended */

static _Noreturn void wrong(struct connection *c, const char *what, const char *data, size_t len)
{
    fprintf(stderr, "load: connection %u, answer %u: %s: %.*s\n", c->number, c->num_answers, what,
            (int)(len < 500 ? len : 500), data);
    exit(1);
}

static void keep(struct samples *samples, uint64_t value)
{
    if (samples->len == samples->capacity) {
        samples->capacity = samples->capacity ? 2 * samples->capacity : 65536;
        samples->values = realloc(samples->values, samples->capacity * sizeof *samples->values);
        if (!samples->values)
            die("load: realloc");
    }
    samples->values[samples->len++] = value < UINT32_MAX ? (uint32_t)value : UINT32_MAX;
}

/* ----------------------------------------------------------------------------------------------------- asking */

/* Messages of an agent, of which large bodies are made: code and its escapes, a call of a tool, its result. */
static const char MESSAGE[] =
    "{\"role\":\"user\",\"content\":\"In src/words.py, `count` fails for an empty line:\\n\\n```python\\ndef count(line):\\n"
    "    words = line.split(\\\" \\\")\\n    return {word: words.count(word) for word in words if word != \\\"\\\"}\\n"
    "```\\nWhat does it return there, and what should it?\"},"
    "{\"role\":\"assistant\",\"content\":null,\"tool_calls\":[{\"id\":\"call_7\",\"type\":\"function\",\"function\":{\"name\":"
    "\"run\",\"arguments\":\"{\\\"command\\\":\\\"python -m pytest -q tests/test_words.py\\\",\\\"timeout_s\\\":60}\"}}]},"
    "{\"role\":\"tool\",\"tool_call_id\":\"call_7\",\"content\":\"F..                                    [100%]\\n"
    "tests/test_words.py:12: in test_empty\\n    assert count(\\\"\\\") == {}\\nE   AssertionError\\n1 failed, 2 passed\"},";

/* Definition of a tool, of which an agent offers a few with every request. */
static const char TOOL[] =
    "{\"type\":\"function\",\"function\":{\"name\":\"run_%u\",\"description\":\"Runs a command in the project's shell and "
    "returns its output.\\nA command that takes longer than `timeout_s` is stopped.\",\"parameters\":{\"type\":\"object\","
    "\"properties\":{\"command\":{\"type\":\"string\",\"description\":\"The command.\"},\"timeout_s\":{\"type\":\"integer\","
    "\"minimum\":1}},\"required\":[\"command\"],\"additionalProperties\":false}}}";

static void make_request(void)
{
    static const char text[] = "word ";
    char *body = malloc(options.body + 256 + options.tools * (sizeof TOOL + 16));
    size_t len = (size_t)sprintf(body, "{\"model\":\"m\",%s", options.sse_events ? "\"stream\":true," : "");
    for (unsigned i = 0; i < options.tools; i++) {
        len += (size_t)sprintf(body + len, i ? "," : "\"tools\":[");
        len += (size_t)sprintf(body + len, TOOL, i);
    }
    len += (size_t)sprintf(body + len, "%s\"messages\":[", options.tools ? "]," : "");
    while (len + sizeof MESSAGE + 256 < options.body)
        len += (size_t)sprintf(body + len, "%s", MESSAGE);
    len += (size_t)sprintf(body + len, "{\"role\":\"user\",\"content\":\"");
    while (len + MARKER_BYTES + 4 < options.body)
        body[len] = text[len % 5], len++;
    static const char end[] = "\"}]}";
    before = malloc(len + 1024);
    before_len = (size_t)sprintf(before,
                                 "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n"
                                 "Content-Type: application/json\r\nAuthorization: Bearer %s\r\n"
                                 "Content-Length: %zu\r\n\r\n",
                                 options.port, options.key ? options.key : "none", len + MARKER_BYTES + sizeof end - 1);
    memcpy(before + before_len, body, len);
    before_len += len;
    after = strdup(end);
    after_len = sizeof end - 1;
    free(body);
}

static void watch(struct connection *c, int waits_for_writable)
{
    if (c->waits_for_writable == waits_for_writable)
        return;
    struct epoll_event event = {.events = EPOLLIN | (waits_for_writable ? EPOLLOUT : 0), .data.ptr = c};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &event))
        die("load: epoll_ctl");
    c->waits_for_writable = waits_for_writable;
}

static void send_rest(struct connection *c)
{
    const size_t total = before_len + MARKER_BYTES + after_len;
    while (c->sent < total) {
        struct iovec parts[3] = {{before, before_len}, {c->marker, MARKER_BYTES}, {after, after_len}};
        size_t skip = c->sent;
        int first = 0;
        while (skip >= parts[first].iov_len)
            skip -= parts[first++].iov_len;
        parts[first].iov_base = (char *)parts[first].iov_base + skip;
        parts[first].iov_len -= skip;
        struct msghdr message = {.msg_iov = parts + first, .msg_iovlen = (size_t)(3 - first)};
        ssize_t n = sendmsg(c->fd, &message, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) {
            watch(c, 1);
            return;
        }
        if (n < 0)
            wrong(c, "cannot send", strerror(errno), 80);
        c->sent += (size_t)n;
    }
    watch(c, 0);
}

static void ask(struct connection *c)
{
    static uint32_t next_id;
    c->marker[0] = '#';
    put_hex(c->marker + 1, next_id++, ID_DIGITS);
    put_hex(c->marker + 1 + ID_DIGITS, options.sse_events, EVENTS_DIGITS);
    put_hex(c->marker + 1 + ID_DIGITS + EVENTS_DIGITS, (uint64_t)(options.pace_ms * 10 + 0.5), PACE_DIGITS);
    c->sent = 0;
    c->state = HEAD;
    c->head_len = c->text_len = 0;
    c->sse_event = 0;
    c->is_done = 0;
    c->asked_ns = now_ns();
    send_rest(c);
}

static void connect_to_gateway(struct connection *c)
{
    int on = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)options.port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (options.stall) {
        /* So that what is not read waits in the gateway, not here; and not in the kernel, which for the loopback's
         * large packets would keep megabytes of it: packets of the size that a network has. */
        int few = 4096, packet = 1400;
        setsockopt(c->fd, SOL_SOCKET, SO_RCVBUF, &few, sizeof few);
        setsockopt(c->fd, IPPROTO_TCP, TCP_MAXSEG, &packet, sizeof packet);
    }
    if (c->fd < 0 || connect(c->fd, (struct sockaddr *)&address, sizeof address))
        die("load: connect");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    c->waits_for_writable = 0;
    if (fcntl(c->fd, F_SETFL, O_NONBLOCK) || epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event))
        die("load: a new connection");
}

/* ---------------------------------------------------------------------------------------------------- reading */

static void end_answer(struct connection *c)
{
    uint64_t now = now_ns();
    if (options.sse_events) {
        if (c->text_len)
            wrong(c, "a stream ends within a line", c->text, c->text_len);
        if (c->sse_event != options.sse_events || !c->is_done)
            wrong(c, "a stream ends too early", c->head, c->head_len);
    } else {
        const char *marker = memchr(c->text, '#', c->text_len);
        size_t words_len = sizeof ANSWER_WORDS - 1;
        if (!marker || c->text + c->text_len - marker < (ptrdiff_t)(MARKER_BYTES + words_len + 2) ||
            memcmp(marker, c->marker, MARKER_BYTES) || memcmp(marker + MARKER_BYTES, ANSWER_WORDS, words_len) ||
            marker[MARKER_BYTES + words_len] != '"' || c->text[c->text_len - 1] != '}')
            wrong(c, "not the answer to this request", c->text, c->text_len);
    }
    c->num_answers++;
    counts.total_answers++;
    if (now >= begin_ns && now < end_ns) {
        counts.answers++;
        keep(&latencies, now - c->asked_ns);
    }
    last_ns = now;
    c->state = IDLE;
    if (options.answers ? c->num_answers < options.answers : now < end_ns)
        ask(c);
    else {
        close(c->fd);
        c->fd = -1;
        num_open--;
    }
}

/* Read one line of a stream, without its line end. */
static void read_line(struct connection *c, const char *line, size_t len, uint64_t now)
{
    const char *stamp = memchr(line, '#', len);
    if (!stamp) {
        if (len >= 12 && !memcmp(line, "data: [DONE]", 12))
            c->is_done = 1;
        return;
    }
    uint64_t number, sent_ns;
    if (memcmp(line, "data: ", 6) || line + len - stamp < STAMP_BYTES || !get_hex(stamp + 1, NUMBER_DIGITS, &number) ||
        !get_hex(stamp + 1 + NUMBER_DIGITS, TIME_DIGITS, &sent_ns) || number != c->sse_event || line[len - 1] != '}')
        wrong(c, "not the next SSE event", line, len);
    c->sse_event++;
    counts.total_sse_events++;
    if (now < begin_ns || now >= end_ns)
        return;
    counts.sse_events++;
    if (!number)
        keep(&firsts, now - c->asked_ns);
    keep(&delays, now - sent_ns);
    counts.late += (double)(now - sent_ns) > options.late_ms * 1e6;
}

static void read_body(struct connection *c, const char *data, size_t len, uint64_t now)
{
    if (options.sse_events) {
        const char *end = data + len, *newline;
        while (data < end && (newline = memchr(data, '\n', (size_t)(end - data)))) {
            size_t size = (size_t)(newline - data);
            const char *line = data;
            if (c->text_len) {
                if (c->text_len + size > TEXT_BYTES)
                    wrong(c, "a long line", data, size);
                memcpy(c->text + c->text_len, data, size);
                line = c->text;
                size += c->text_len;
                c->text_len = 0;
            }
            if (size && line[size - 1] == '\r')
                size--;
            read_line(c, line, size, now);
            data = newline + 1;
        }
        len = (size_t)(end - data);
    }
    if (c->text_len + len > TEXT_BYTES)
        wrong(c, "a long answer", data, len);
    memcpy(c->text + c->text_len, data, len);
    c->text_len += len;
}

/* Take one line's bytes into `head`; return whether the line is whole. It is then without its end. */
static int take_line(struct connection *c, const char **data, const char *end)
{
    const char *newline = memchr(*data, '\n', (size_t)(end - *data));
    const char *stop = newline ? newline : end;
    if (c->head_len + (size_t)(stop - *data) >= HEAD_BYTES)
        wrong(c, "a long head", c->head, c->head_len);
    memcpy(c->head + c->head_len, *data, (size_t)(stop - *data));
    c->head_len += (size_t)(stop - *data);
    *data = newline ? newline + 1 : end;
    if (!newline)
        return 0;
    if (c->head_len && c->head[c->head_len - 1] == '\r')
        c->head_len--;
    c->head[c->head_len] = 0;
    return 1;
}

static void end_head(struct connection *c)
{
    c->head[c->head_len] = 0;
    if (strncmp(c->head, "HTTP/1.1 200", 12))
        wrong(c, "status", c->head, c->head_len);
    char *length = strcasestr(c->head, "\ncontent-length:");
    char *coding = strcasestr(c->head, "\ntransfer-encoding:");
    c->is_chunked = coding != NULL;
    if (!coding && !length)
        wrong(c, "no framing", c->head, c->head_len);
    c->left = length ? strtoull(length + 16, NULL, 10) : 0;
    c->state = c->is_chunked ? CHUNK_SIZE : BODY;
    c->head_len = 0;
}

/* Read what has arrived of an answer. */
static void read_bytes(struct connection *c, const char *data, size_t len)
{
    const char *end = data + len;
    uint64_t now = now_ns();
    while (data < end) {
        switch (c->state) {
        case IDLE:
            wrong(c, "bytes beyond the answer", data, (size_t)(end - data));
        case HEAD: {
            /* Bytes before the head's end may be in an earlier piece: look for it from there. */
            size_t from = c->head_len < 3 ? 0 : c->head_len - 3;
            size_t size = (size_t)(end - data), had = c->head_len;
            if (size > HEAD_BYTES - 1 - had)
                size = HEAD_BYTES - 1 - had;
            memcpy(c->head + had, data, size);
            char *stop = memmem(c->head + from, had + size - from, "\r\n\r\n", 4);
            if (!stop) {
                if (had + size == HEAD_BYTES - 1)
                    wrong(c, "a long head", c->head, had);
                c->head_len = had + size;
                return;
            }
            data += (size_t)(stop + 4 - c->head) - had;
            c->head_len = (size_t)(stop + 2 - c->head);
            end_head(c);
            if (c->state == BODY && !c->left)
                end_answer(c);
            break;
        }
        case BODY:
        case CHUNK: {
            size_t size = (size_t)(end - data) < c->left ? (size_t)(end - data) : (size_t)c->left;
            read_body(c, data, size, now);
            data += size;
            c->left -= size;
            if (!c->left) {
                if (c->state == BODY)
                    end_answer(c);
                else
                    c->state = CHUNK_END;
            }
            break;
        }
        case CHUNK_SIZE:
            if (take_line(c, &data, end)) {
                char *stop;
                c->left = strtoull(c->head, &stop, 16);
                if (stop == c->head)
                    wrong(c, "no chunk size", c->head, c->head_len);
                c->state = c->left ? CHUNK : TRAILER;
                c->head_len = 0;
            }
            break;
        case CHUNK_END:
            if (take_line(c, &data, end)) {
                if (c->head_len)
                    wrong(c, "a chunk's end", c->head, c->head_len);
                c->state = CHUNK_SIZE;
            }
            break;
        case TRAILER:
            if (take_line(c, &data, end)) {
                if (!c->head_len)
                    end_answer(c);
                c->head_len = 0;
            }
            break;
        }
        if (c->fd < 0 && data < end)
            wrong(c, "bytes after the last answer", data, (size_t)(end - data));
    }
}

static void receive(struct connection *c)
{
    static char buffer[READ_BYTES];
    ssize_t n = recv(c->fd, buffer, sizeof buffer, 0);
    if (n < 0 && errno == EAGAIN)
        return;
    if (n > 0) {
        read_bytes(c, buffer, (size_t)n);
        return;
    }
    /* A server may close a kept connection before it has read the next request; one that has begun to answer may not.
     * */
    if (c->state != HEAD || c->head_len || !c->num_answers)
        wrong(c, n < 0 ? strerror(errno) : "closed in the middle of an answer", c->head, c->head_len);
    close(c->fd);
    counts.reconnects++;
    connect_to_gateway(c);
    c->sent = 0;
    send_rest(c);
}

/* --------------------------------------------------------------------------------------------------- the run */

static int by_value(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static void print_times(const char *name, struct samples *samples)
{
    if (!samples->len)
        return;
    qsort(samples->values, samples->len, sizeof *samples->values, by_value);
    static const double parts[] = {0.5, 0.9, 0.99, 1};
    static const char *const names[] = {"p50", "p90", "p99", "max"};
    for (int i = 0; i < 4; i++) {
        size_t place = (size_t)(parts[i] * (double)(samples->len - 1) + 0.5);
        printf(",\"%s_%s_us\":%.1f", name, names[i], samples->values[place] / 1e3);
    }
}

static volatile sig_atomic_t may_read;

static void let_read(int signal)
{
    (void)signal;
    may_read = 1;
}

/* Ask on all connections, and wait with reading until there is a signal. */
static void stall(struct connection *connections)
{
    sigset_t set, before_set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigprocmask(SIG_BLOCK, &set, &before_set);
    signal(SIGUSR1, let_read);
    for (unsigned i = 0; i < options.connections; i++) {
        connect_to_gateway(&connections[i]);
        ask(&connections[i]);
    }
    num_open = options.connections;
    puts("stalled");
    fflush(stdout);
    while (!may_read)
        sigsuspend(&before_set);
}

static void run(void)
{
    struct connection *connections = calloc(options.connections, sizeof *connections);
    struct epoll_event events[MAX_EVENTS];
    unsigned num_begun = 0;
    if (!connections)
        die("load: calloc");
    for (unsigned i = 0; i < options.connections; i++)
        connections[i].number = i;
    if (options.stall) {
        stall(connections);
        num_begun = options.connections;
    }
    uint64_t started_ns = now_ns();
    begin_ns = started_ns + (uint64_t)(options.warm * 1e9);
    end_ns = options.answers ? UINT64_MAX : begin_ns + (uint64_t)(options.seconds * 1e9);
    while (num_begun < options.connections || num_open) {
        struct timespec wait = {1, 0};
        uint64_t now = now_ns();
        for (; num_begun < options.connections; num_begun++) {
            uint64_t due = started_ns + (uint64_t)(options.spread_ms * 1e6 / options.connections * num_begun);
            if (due > now) {
                wait.tv_sec = (time_t)((due - now) / 1000000000u);
                wait.tv_nsec = (long)((due - now) % 1000000000u);
                break;
            }
            num_open++;
            connect_to_gateway(&connections[num_begun]);
            ask(&connections[num_begun]);
        }
        int num_events = epoll_pwait2(epoll_fd, events, MAX_EVENTS, &wait, NULL);
        if (num_events < 0 && errno != EINTR)
            die("load: epoll_pwait2");
        for (int i = 0; i < num_events; i++) {
            struct connection *c = events[i].data.ptr;
            if (events[i].events & EPOLLOUT)
                send_rest(c);
            if (events[i].events & ~EPOLLOUT)
                receive(c);
        }
        uint64_t quiet_ns = last_ns > started_ns ? last_ns : started_ns;
        uint64_t stream_ns = (uint64_t)(options.sse_events * options.pace_ms * 1e6);
        if (num_events <= 0 && now_ns() > quiet_ns + stream_ns + GRACE_S * 1000000000ull) {
            fprintf(stderr, "load: %u connections wait for %d s for an answer\n", num_open, GRACE_S);
            exit(1);
        }
    }
    uint64_t stop_ns = options.answers ? last_ns : end_ns;
    double seconds = (double)(stop_ns - begin_ns) / 1e9;
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    double cpu_s = (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
                   (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
    printf("{\"seconds\":%.6f,\"answers\":%lu,\"sse_events\":%lu,\"total_answers\":%lu,\"total_sse_events\":%lu,\"late\":%lu,"
           "\"reconnects\":%lu,\"cpu_s\":%.6f",
           seconds, counts.answers, counts.sse_events, counts.total_answers, counts.total_sse_events, counts.late,
           counts.reconnects, cpu_s);
    print_times("latency", &latencies);
    print_times("first", &firsts);
    print_times("delay", &delays);
    puts("}");
}

static double number(const char *text)
{
    char *end;
    double value = strtod(text, &end);
    if (*end || end == text || value < 0) {
        fprintf(stderr, "load: %s is no number\n", text);
        exit(2);
    }
    return value;
}

int main(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "usage: load PORT CONNECTIONS [--OPTION VALUE]...\n");
        return 2;
    }
    options.port = (int)number(argv[1]);
    options.connections = (unsigned)number(argv[2]);
    for (int i = 3; i < argc; i++) {
        const char *name = argv[i];
        if (!strcmp(name, "--stall")) {
            options.stall = 1;
            continue;
        }
        const char *value = i + 1 < argc ? argv[++i] : "";
        if (!strcmp(name, "--key"))
            options.key = value;
        else if (!strcmp(name, "--seconds"))
            options.seconds = number(value);
        else if (!strcmp(name, "--warm"))
            options.warm = number(value);
        else if (!strcmp(name, "--answers"))
            options.answers = (unsigned)number(value);
        else if (!strcmp(name, "--body"))
            options.body = (size_t)number(value);
        else if (!strcmp(name, "--tools"))
            options.tools = (unsigned)number(value);
        else if (!strcmp(name, "--late"))
            options.late_ms = number(value);
        else if (!strcmp(name, "--sse-events"))
            options.sse_events = (unsigned)number(value);
        else if (!strcmp(name, "--pace"))
            options.pace_ms = number(value);
        else if (!strcmp(name, "--spread"))
            options.spread_ms = number(value);
        else {
            fprintf(stderr, "load: no option %s\n", name);
            return 2;
        }
    }
    if (options.sse_events > MAX_SSE_EVENTS || options.pace_ms * 10 > 0xffff) {
        fprintf(stderr, "load: at most %u SSE events, %d ms apart\n", MAX_SSE_EVENTS, 0xffff / 10);
        return 2;
    }
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    make_request();
    run();
}
