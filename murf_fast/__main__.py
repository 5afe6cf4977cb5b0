from murf_fast.cli import main

main()
