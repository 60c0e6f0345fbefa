"""What is measured beside the tests. Imports neither fairscale nor flask; does not print.

flags, jobs       the words of metaseq-api-bench, and what each does
subject, peer     what is measured: random weights or a checkpoint; as our engine, and as Hugging Face's model
work, limits      what each side is asked and how long it takes; what the machine could do at most
latency           one stream
throughput        many at once, without HTTP
serve             through HTTP, by concurrency or request rate       (services, shape_host, watching)
startup           from the command to the first token
http              what the front end costs, beside the engine alone  (clients)
reshard           how fast shards are joined, and in how much memory, beside cp
load              how fast ranks read a checkpoint to serve it, beside a plain read of the same bytes
figures, plot, report   rows and percentiles; throughput against latency as SVG; what is kept, and the page it goes to
gpu_*             `make gpu-check`: parity and speed on a GPU
"""
