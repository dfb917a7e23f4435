/* A step of decodes several times over, without going back to Python in between. */
#ifndef NEURON_BURST_H
#define NEURON_BURST_H

#include "step.h"

/* What comes after the first round, which is the step itself. */
struct burst {
    int num_rounds;       /* with the first */
    int32_t *ids;         /* [num_rounds - 1, B]: what the later rounds sample */
    const int32_t *stops; /* [num_stops]: a token that ends the burst, whichever row samples it */
    int num_stops;
    int fd;           /* so does something to read there; -1: no descriptor */
    int32_t *scratch; /* [4, B] */
};

/* Run `step`, in which every sequence has one row, sampled into ids; then again with each row's own token behind it, for
 * as long as nothing ends it. Returns the rounds run: whatever ends a burst is in the last. The page tables have room for
 * all of them. `finite` is the last round's. */
int run_burst(const struct model *model, const struct step *step, const struct burst *burst);

#endif
