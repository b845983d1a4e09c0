"""`python -m furiosa_llm`: the command line."""

from furiosa_llm.cli.main import main

if __name__ == "__main__":
    main()
