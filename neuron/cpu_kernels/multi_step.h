/* Multi-step decode: several decode steps in one call, without Python in between. */
#ifndef NEURON_MULTI_STEP_H
#define NEURON_MULTI_STEP_H

#include "step.h"

/* The steps after the first. */
struct multi_step {
    int num_steps;       /* with the first */
    int32_t *ids;         /* [num_steps - 1, B]: the tokens of the later steps */
    const int32_t *stops; /* [num_stops]: a token that ends the call, whichever row samples it */
    int num_stops;
    int fd;           /* so does something to read there; -1: no descriptor */
    int32_t *scratch; /* [4, B] */
};

/* Run `step`, in which every sequence has one row, sampled into ids; then again with each row's own token behind it, for
 * as long as nothing ends it. Returns the steps run: a stop, a message or a NaN is in the last. The page tables have room
 * for all of them. `finite` is the last step's. */
int run_multi_step(const struct model *model, const struct step *step, const struct multi_step *multi);

#endif
