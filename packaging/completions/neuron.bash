# bash completion for neuron; written by packaging/command_line.py
_neuron() {
    local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}" command="" word
    COMPREPLY=()
    case "$previous" in
        --config) mapfile -t COMPREPLY < <(compgen -f -- "$current"); return ;;
        --log-level) mapfile -t COMPREPLY < <(compgen -W 'debug info warning error' -- "$current"); return ;;
        --devices|--listen|--name) return ;;
    esac
    case "$command" in
        '') mapfile -t COMPREPLY < <(compgen -W '-h --help --devices --config --listen --name --log-level --check --version' -- "$current") ;;
    esac
}
complete -o filenames -F _neuron neuron
