"""The library's structures as ctypes sees them, and the numbers that its headers define."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_double, c_float, c_int, c_int32, c_int64, c_void_p

FLOAT32, BFLOAT16, INT8, NF4 = range(4)
FORMATS = {"float32": FLOAT32, "bfloat16": BFLOAT16, "int8": INT8, "nf4": NF4}
MOST_ROWS = 256  # of a step
MOST_GUESSES = 64  # of a head
MOST_CHAIN = 64  # copied tokens
MOST_DEPTH = 32  # of a tree that is chosen


class Matrix(ctypes.Structure):
    """mc_matrix of matmul.h."""

    _fields_ = (
        ("format", c_int),
        ("outputs", c_int),
        ("inputs", c_int),
        ("packed", c_void_p),
        ("bias", c_void_p),
    )


class Layer(ctypes.Structure):
    """mc_layer of step.h."""

    _fields_ = (
        ("attention_norm", c_void_p),
        ("attention_post", c_void_p),
        ("mlp_norm", c_void_p),
        ("mlp_post", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("qkv", Matrix),
        ("output", Matrix),
        ("gate", Matrix),
        ("up", Matrix),
        ("down", Matrix),
        ("window", c_int32),
        ("rope", c_int32),
    )


class Model(ctypes.Structure):
    """mc_model of step.h."""

    _fields_ = (
        ("hidden", c_int32),
        ("layers", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("rotary", c_int32),
        ("intermediate", c_int32),
        ("vocabulary", c_int32),
        ("positions", c_int32),
        ("activation", c_int32),
        ("epsilon", c_float),
        ("attention_scale", c_float),
        ("attention_cap", c_float),
        ("final_cap", c_float),
        ("embedding_scale", c_float),
        ("embedding_format", c_int32),
        ("embedding", c_void_p),
        ("final_norm", c_void_p),
        ("lm_head", Matrix),
        ("layer", POINTER(Layer)),
        ("cosine", c_void_p * 2),
        ("sine", c_void_p * 2),
    )


class Bias(ctypes.Structure):
    """mc_bias of candidates.h."""

    _fields_ = (
        ("rank", c_int32),
        ("format", c_int32),
        ("parents", c_int32),
        ("tokens", c_int32),
        ("first", c_void_p),
        ("second", c_void_p),
        ("rows", c_void_p),
    )


class HeadsOf(ctypes.Structure):
    """mc_heads of step.h."""

    _fields_ = (
        ("heads", c_int32),
        ("layers", c_int32),
        ("block", POINTER(Matrix)),
        ("lm_head", POINTER(Matrix)),
        ("shared", POINTER(Matrix)),
        ("vocabulary", c_int32),
        ("tokens", c_void_p),
        ("bias", Bias),
    )


class CacheOf(ctypes.Structure):
    """mc_cache of step.h."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("layer_stride", c_int64),
        ("head_stride", c_int64),
        ("capacity", c_int32),
        ("format", c_int32),
    )


class Step(ctypes.Structure):
    """mc_step of step.h."""

    _fields_ = (
        ("rows", c_int32),
        ("start", c_int32),
        ("tokens", c_void_p),
        ("table", c_void_p),
        ("root", c_int32),
        ("ranked", c_int32),
        ("parents", c_void_p),
        ("choice", c_void_p),
        ("texts", c_void_p),
        ("places", c_void_p),
        ("last", c_void_p),
        ("guesses", c_void_p),
        ("log_p", c_void_p),
        ("row_tokens", c_void_p),
        ("hidden", c_void_p),
        ("logits", c_void_p),
        ("argmax", c_void_p),
        ("first_logits", c_int32),
        ("accept", c_int32),
        ("accepted", c_int32),
        ("next", c_int32),
        ("heads_seconds", c_double),
        ("rows_seconds", c_double),
    )


class Choice(ctypes.Structure):
    """mc_choice of choose.h."""

    _fields_ = (
        ("paths", c_int32),
        ("parents", c_void_p),
        ("ranks", c_void_p),
        ("nodes", c_int32),
        ("scale", c_void_p),
        ("shift", c_void_p),
        ("measured", c_void_p),
        ("chain", c_int32),
        ("chain_tokens", c_void_p),
        ("chain_log_p", c_void_p),
        ("coupling", c_void_p),
        ("rows", c_void_p),
        ("tokens", c_void_p),
        ("row_parents", c_void_p),
        ("joint", c_int32),
    )


class Coupling(ctypes.Structure):
    """mc_coupling of candidates.h."""

    _fields_ = (
        ("seed", c_int64),
        ("position", c_int64),
        ("top_p", c_double),
        ("min_p", c_double),
        ("of_log_p", c_void_p),
        ("of_noise", c_void_p),
        ("noise", c_void_p),
        ("temperature", c_float),
        ("top_k", c_int32),
    )


class Candidates(ctypes.Structure):
    """mc_candidates of candidates.h."""

    _fields_ = (
        ("heads", c_int32),
        ("ranked", c_int32),
        ("vocabulary", c_int32),
        ("tokens", c_void_p),
        ("indices", c_void_p),
        ("log_p", c_void_p),
        ("bias", c_void_p),
    )


STRUCTURES = (Matrix, Layer, Model, HeadsOf, CacheOf, Step, Choice, Coupling, Bias, Candidates)


class Rule(ctypes.Structure):
    """mc_rule of rules.h."""

    _fields_ = (
        ("logits", c_void_p),
        ("tokens", c_void_p),
        ("parents", c_void_p),
        ("token_keys", c_void_p),
        ("counts", c_void_p),
        ("scores", c_void_p),
        ("position", c_int64),
        ("seed", c_int64),
        ("top_p", c_double),
        ("min_p", c_double),
        ("epsilon", c_double),
        ("delta", c_double),
        ("temperature", c_float),
        ("repetition", c_float),
        ("presence", c_float),
        ("frequency", c_float),
        ("top_k", c_int32),
        ("kind", c_int32),
        ("rows", c_int32),
        ("vocabulary", c_int32),
        ("row", c_int32),
        ("next", c_int32),
    )
