# fish completion for neuron; written by packaging/command_line.py
complete -c neuron -f
complete -c neuron -s h -l help -d 'show this help message and exit'
complete -c neuron -l devices -x -d 'devices to use: '\''auto'\'', '\''cpu'\'', or GPU indices such as '\''0,1'\'''
complete -c neuron -l config -r -F -d 'neuron.toml (default: $NEURON_CONFIG, /etc/neuron)'
complete -c neuron -l listen -x -d 'address to serve on, host:port (default 127.0.0.1:13131)'
complete -c neuron -l name -x -d 'this node'\''s name (default: the host'\''s)'
complete -c neuron -l log-level -x -a 'debug info warning error' -d ''
complete -c neuron -l check -d 'check the configuration and exit'
complete -c neuron -l version -d 'show program'\''s version number and exit'
