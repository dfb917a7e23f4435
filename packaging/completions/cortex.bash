# bash completion for cortex; written by packaging/command_line.py
_cortex() {
    local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}" command="" word
    COMPREPLY=()
    case "$previous" in
        --config|--key-file|--ca-file) mapfile -t COMPREPLY < <(compgen -f -- "$current"); return ;;
        --by) mapfile -t COMPREPLY < <(compgen -W 'key model day' -- "$current"); return ;;
        --listen|--metrics-listen|--workers|--url|--context|--node|--id|--system|--set|--drain-timeout|--models|--priority|--requests-per-minute|--max-concurrent|--tokens-per-window|--balance-tokens|--window|--expires|--from|--to|--key|--model|--minutes|--size|--small-model) return ;;
    esac
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        case "$word" in serve|run|pull|show|rm|ps|search|status|models|load|unload|forget|pin|drain|dashboard|reload|keys|usage|capture|launch|demo) command="$word"; break ;; esac
    done
    case "$command" in
        '') mapfile -t COMPREPLY < <(compgen -W 'serve run pull show rm ps search status models load unload forget pin drain dashboard reload keys usage capture launch demo -h --help --version' -- "$current") ;;
        serve) mapfile -t COMPREPLY < <(compgen -W '-h --help --config --listen --metrics-listen --workers --check' -- "$current") ;;
        run) mapfile -t COMPREPLY < <(compgen -W '-h --help --url --config --key-file --ca-file --context --node --id --system --set --text --json --no-start' -- "$current") ;;
        pull) mapfile -t COMPREPLY < <(compgen -W '-h --help --json --url --config --key-file --ca-file --context --node --id' -- "$current") ;;
        show) mapfile -t COMPREPLY < <(compgen -W '-h --help --json --url --config --key-file --ca-file --context --node --id' -- "$current") ;;
        rm) mapfile -t COMPREPLY < <(compgen -W '-h --help --json --url --config --key-file --ca-file' -- "$current") ;;
        ps) mapfile -t COMPREPLY < <(compgen -W '-h --help --json --url --config --key-file --ca-file' -- "$current") ;;
        search) mapfile -t COMPREPLY < <(compgen -W '-h --help --json' -- "$current") ;;
        status) mapfile -t COMPREPLY < <(compgen -W '-h --help --url --config --key-file --ca-file --json --watch' -- "$current") ;;
        models) mapfile -t COMPREPLY < <(compgen -W '-h --help --url --config --key-file --ca-file --json' -- "$current") ;;
        load) mapfile -t COMPREPLY < <(compgen -W '-h --help --url --config --key-file --ca-file --json --node' -- "$current") ;;
        unload) mapfile -t COMPREPLY < <(compgen -W '-h --help --url --config --key-file --ca-file --json --node --drain-timeout' -- "$current") ;;
        forget) mapfile -t COMPREPLY < <(compgen -W '-h --help --url --config --key-file --ca-file --json --node' -- "$current") ;;
        pin) mapfile -t COMPREPLY < <(compgen -W '-h --help --url --config --key-file --ca-file --json --node --off' -- "$current") ;;
        drain) mapfile -t COMPREPLY < <(compgen -W '-h --help --url --config --key-file --ca-file --json --off' -- "$current") ;;
        dashboard) mapfile -t COMPREPLY < <(compgen -W '-h --help --url --config --key-file --ca-file --json' -- "$current") ;;
        reload) mapfile -t COMPREPLY < <(compgen -W '-h --help --url --config --key-file --ca-file --json' -- "$current") ;;
        keys) mapfile -t COMPREPLY < <(compgen -W '-h --help --url --config --key-file --ca-file --json --models --admin --priority --requests-per-minute --max-concurrent --tokens-per-window --balance-tokens --window --expires --print' -- "$current") ;;
        usage) mapfile -t COMPREPLY < <(compgen -W '-h --help --url --config --key-file --ca-file --json --by --from --to --key --model' -- "$current") ;;
        capture) mapfile -t COMPREPLY < <(compgen -W '-h --help --url --config --key-file --ca-file --json --minutes --size --model' -- "$current") ;;
        launch) mapfile -t COMPREPLY < <(compgen -W '-h --help --model --small-model --print --url --config --key-file --ca-file' -- "$current") ;;
        demo) mapfile -t COMPREPLY < <(compgen -W '-h --help --once' -- "$current") ;;
    esac
}
complete -o filenames -F _cortex cortex
