"""The files of a checkpoint: found, read piecewise, and resharded. Imports torch; does not know the model code.

unpickle    a pickle as plain data: nothing named in it is imported or called
inert       what such data says, without the foreign objects in it
alike       a pickle that differs from one already read in single numbers only
archive     one file of torch.save, memory-mapped
legacy      where things lie in a file of before torch 1.6
flat        the arithmetic of fairscale's flat parameters
bare        the same where a file does not say what is in them
slices      the parameters in a unit's slices
rules       names, and how metaseq splits each tensor over parts
tensors     tensors in pieces, read by rows and columns
folder      which files make one checkpoint
part        one tensor-parallel part out of its shards
checkpoint  the whole model: a config, and tensors of which any slice can be read
whole       a model whose files are not metaseq's: whole tensors, or boxes of them
mapped      one file whose bytes are mapped
safetensors_file  the safetensors format
hugging_face  a folder that transformers left
dcp         a folder of torch.distributed.checkpoint
dcp_metadata  what its pickles say
dcp_optimizer  and what of its optimizer can be had
counted     a checkpoint that tells how much of it was read
opening     which of these a path stands for
verify      reads a checkpoint and says what is wrong with its numbers
to_hugging_face  a folder that transformers loads, written
write       a file written piecewise, under its name only when whole
rest        what a file holds beside the weights
contents    what goes into one file of a resharded checkpoint
recut       a model's tensors as any number of parts holds them
reshard     any parts and shards to any others
outputs     the files of a job, written several at a time; what is whole stays
door        what the scripts on checkpoints share: flags, progress, errors
trainer     writes what metaseq's trainer leaves (needs fairscale; the demo and the tests use it)
"""

from metaseq_api.checkpoint.checkpoint import Checkpoint
from metaseq_api.checkpoint.opening import open_checkpoint
from metaseq_api.checkpoint.tensors import LogicalTensor

__all__ = ["Checkpoint", "LogicalTensor", "open_checkpoint"]
