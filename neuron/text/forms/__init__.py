"""Forms in which models write tool calls, a file each; :mod:`neuron.text.forms.registry` lists them."""
