/* The rounds of a burst: which arrays of a step change from one to the next, and what ends it. */
#include "burst.h"

#include <poll.h>

static int goes_on(const struct step *s, const struct burst *burst) {
    for (int b = 0; b < s->num_sequences; b++) {
        if (!s->finite[b] || s->ids[b] == NON_FINITE) return 0;
        for (int i = 0; i < burst->num_stops; i++)
            if (s->ids[b] == burst->stops[i]) return 0;
    }
    struct pollfd source = {.fd = burst->fd, .events = POLLIN};
    return poll(&source, 1, 0) == 0;
}

int run_burst(const struct model *model, const struct step *step, const struct burst *burst) {
    struct step next = *step;
    int count = step->num_sequences;
    int32_t *token_ids = burst->scratch, *positions = token_ids + count, *slot_mapping = positions + count;
    int32_t *context_lens = slot_mapping + count;
    run_step(model, step);
    int done = 1;
    for (; done < burst->num_rounds && goes_on(&next, burst); done++) {
        for (int b = 0; b < count; b++) {
            int32_t position = step->positions[b] + done;
            const int32_t *pages = step->page_table + (size_t)b * (size_t)step->page_columns;
            token_ids[b] = next.ids[b];
            positions[b] = position;
            slot_mapping[b] = pages[position / PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS;
            context_lens[b] = step->context_lens[b] + done;
        }
        next.token_ids = token_ids;
        next.positions = positions;
        next.slot_mapping = slot_mapping;
        next.context_lens = context_lens;
        next.ids = burst->ids + (size_t)(done - 1) * (size_t)count;
        next.round = done;
        run_step(model, &next);
    }
    return done;
}
