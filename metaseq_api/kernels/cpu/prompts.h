#pragma once
#include "step.h"

/* One head of piece n of the step's prompts; `room` for prompt_room bytes, of the longest context of any. */
void attend_prompt(const step *s, long n, long h, const char *q, const char *keys, const char *values, char *out, int bytes, void *room);
size_t prompt_room(const step *s, long context, int bytes);
