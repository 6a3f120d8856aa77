//! Model files, tokenizer, decoder, sampling and the runner behind the command line.
