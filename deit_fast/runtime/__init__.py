"""What every long-running verb uses: processes, signals, metrics, profiling, files."""
