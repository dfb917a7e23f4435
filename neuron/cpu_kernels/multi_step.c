/* Multi-step decode: the arrays that change from one step to the next, and the conditions that end it. */
#include "multi_step.h"

#include <poll.h>

static int goes_on(const struct step *s, const struct multi_step *multi) {
    for (int b = 0; b < s->num_sequences; b++) {
        if (!s->finite[b] || s->ids[b] == NON_FINITE) return 0;
        for (int i = 0; i < multi->num_stops; i++)
            if (s->ids[b] == multi->stops[i]) return 0;
    }
    struct pollfd source = {.fd = multi->fd, .events = POLLIN};
    return poll(&source, 1, 0) == 0;
}

int run_multi_step(const struct model *model, const struct step *step, const struct multi_step *multi) {
    struct step next = *step;
    int count = step->num_sequences;
    int32_t *token_ids = multi->scratch, *positions = token_ids + count, *context_lens = positions + count;
    int32_t *slot_mappings = context_lens + count;
    run_step(model, step);
    int done = 1;
    for (; done < multi->num_steps && goes_on(&next, multi); done++) {
        for (int b = 0; b < count; b++) {
            int32_t position = step->positions[b] + done;
            token_ids[b] = next.ids[b];
            positions[b] = position;
            context_lens[b] = step->context_lens[b] + done;
            for (int row = b; row < count * model->num_tables; row += count) {
                const int32_t *pages = step->page_tables + (size_t)row * (size_t)step->page_columns;
                slot_mappings[row] = pages[position / PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS;
            }
        }
        next.token_ids = token_ids;
        next.positions = positions;
        next.slot_mappings = slot_mappings;
        next.context_lens = context_lens;
        next.ids = multi->ids + (size_t)(done - 1) * (size_t)count;
        next.replays = NULL;
        next.index = done;
        run_step(model, &next);
    }
    return done;
}
