"""Forms in which models write tool calls and reasoning, a file each; :mod:`neuron.text.forms.registry` lists them."""
