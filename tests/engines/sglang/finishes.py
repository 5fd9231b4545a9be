"""Run by the engine's Python: the finish of each of SGLang's own finish reasons, as JSON."""

import json

from sglang.srt.managers import schedule_batch

from stagetrace.adapters.sglang.extract import finish_of

reasons = {
    "FINISH_MATCHED_TOKEN": (1,),
    "FINISH_MATCHED_STR": ("end",),
    "FINISHED_MATCHED_REGEX": ("[a-z]",),
    "FINISH_LENGTH": (10,),
    "FINISH_ABORT": (),
}
every = [name for name in vars(schedule_batch) if name.startswith("FINISH")]
assert sorted(every) == sorted(reasons), every
found = {name: finish_of(getattr(schedule_batch, name)(*arguments)).name for name, arguments in reasons.items()}
found["refused"] = finish_of(schedule_batch.FINISH_ABORT("too long", 400)).name
found["none"] = finish_of(None).name
print(json.dumps(found))
