"""Coverage-guided fuzzing (atheris, which is libFuzzer) of everything that reads hostile input.

    tools/fuzz TARGET... | --all [--seconds N] [--jobs N] [--json FILE]
    tools/fuzz --list
    tools/fuzz --seeds            writes the hand-made seeds to tests/corpus anew
    tools/fuzz --keep TARGET...   adds the inputs that found most in build/fuzz to tests/corpus

One module for each target. It has a docstring that says what it promises, and

    run(data)      raises anything but DedupError when the promise is broken, for any bytes
    seeds()        name -> bytes: inputs made by hand or by the project's own writer
    BYTES_MAX      the longest input that is tried

`targets` lists them, `engine` runs one under libFuzzer, `__main__` runs several and adds up. Inputs
are in tests/corpus/TARGET (few and small: tests/fault/test_fuzz_corpus.py replays them) and, while
fuzzing goes on, in build/fuzz/TARGET, where a later run continues. An input that broke a promise is
kept as build/fuzz/TARGET.broken/*; once mended it belongs into tests/corpus as `past-*`.

Bounds of each input, which libFuzzer watches: `SECONDS_MAX` and `RSS_MB_MAX` of `engine`. They are
alarms; what bounds work and memory is in the code (docs/hostile-input.md).
"""
