"""Programs as XLA writes them, small enough to count by hand."""

from pathlib import Path

from tools.compiling.hlo import Module, parse

ROOT = Path("/project")

# Two loops, one inside the other: 3 x 4 rounds. The table [1024, 128] float32 (512 KiB) lies in HBM; the inner loop
# adds a row to it and sums a value over the devices, the outer one copies it.
LOOPS = """\
HloModule test, is_scheduled=true

FileNames
1 "/project/maskrcnn_jax/ops/a.py"
2 "/elsewhere/jax/lax.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=4 end_column=4}
2 {file_name_id=2 function_name_id=1 line=9 end_line=9 column=4 end_column=4}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%update (table: f32[1024,128], row: s32[]) -> f32[1024,128] {
  %table = f32[1024,128]{1,0:T(8,128)} parameter(0)
  %row = s32[] parameter(1)
  %zero = s32[] constant(0)
  %old = f32[8,128]{1,0:T(8,128)} dynamic-slice(%table, %row, %zero), dynamic_slice_sizes={8,128}
  %new = f32[8,128]{1,0:T(8,128)} add(%old, %old)
  ROOT %written = f32[1024,128]{1,0:T(8,128)} dynamic-update-slice(%table, %new, %row, %zero)
}

%inner_condition (c.0: (s32[], f32[1024,128], f32[])) -> pred[] {
  %c.0 = (s32[]{:T(128)S(1)}, f32[1024,128]{1,0:T(8,128)}, f32[]{:T(128)S(1)}) parameter(0)
  %four = s32[]{:T(128)S(1)} constant(4)
  %c.i = s32[]{:T(128)S(1)} get-tuple-element(%c.0), index=0
  ROOT %less = pred[]{:T(512)S(1)} compare(%c.i, %four), direction=LT
}

%inner_body (b.0: (s32[], f32[1024,128], f32[])) -> (s32[], f32[1024,128], f32[]) {
  %b.0 = (s32[]{:T(128)S(1)}, f32[1024,128]{1,0:T(8,128)}, f32[]{:T(128)S(1)}) parameter(0)
  %b.i = s32[]{:T(128)S(1)} get-tuple-element(%b.0), index=0
  %b.table = f32[1024,128]{1,0:T(8,128)} get-tuple-element(%b.0), index=1
  %b.value = f32[]{:T(128)S(1)} get-tuple-element(%b.0), index=2
  %one = s32[]{:T(128)S(1)} constant(1)
  %next = s32[]{:T(128)S(1)} add(%b.i, %one)
  %changed = f32[1024,128]{1,0:T(8,128)} fusion(%b.table, %b.i), kind=kLoop, calls=%update
  %reduced = f32[]{:T(128)S(1)} all-reduce(%b.value), replica_groups={{0,1}}, to_apply=%add, \
metadata={stack_frame_id=2}
  ROOT %b.out = (s32[]{:T(128)S(1)}, f32[1024,128]{1,0:T(8,128)}, f32[]{:T(128)S(1)}) tuple(%next, %changed, %reduced)
}

%outer_condition (d.0: (s32[], f32[1024,128], f32[])) -> pred[] {
  %d.0 = (s32[]{:T(128)S(1)}, f32[1024,128]{1,0:T(8,128)}, f32[]{:T(128)S(1)}) parameter(0)
  %d.i = s32[]{:T(128)S(1)} get-tuple-element(%d.0), index=0
  %nine = s32[]{:T(128)S(1)} constant(9)
  ROOT %greater = pred[]{:T(512)S(1)} compare(%nine, %d.i), direction=GT
}

%outer_body (e.0: (s32[], f32[1024,128], f32[])) -> (s32[], f32[1024,128], f32[]) {
  %e.0 = (s32[]{:T(128)S(1)}, f32[1024,128]{1,0:T(8,128)}, f32[]{:T(128)S(1)}) parameter(0)
  %e.i = s32[]{:T(128)S(1)} get-tuple-element(%e.0), index=0
  %e.table = f32[1024,128]{1,0:T(8,128)} get-tuple-element(%e.0), index=1
  %e.value = f32[]{:T(128)S(1)} get-tuple-element(%e.0), index=2
  %three = s32[]{:T(128)S(1)} constant(3)
  %e.next = s32[]{:T(128)S(1)} add(%e.i, %three)
  %e.zero = s32[]{:T(128)S(1)} constant(0)
  %e.copy = f32[1024,128]{1,0:T(8,128)} copy(%e.table)
  %e.start = (s32[]{:T(128)S(1)}, f32[1024,128]{1,0:T(8,128)}, f32[]{:T(128)S(1)}) tuple(%e.zero, %e.copy, %e.value)
  %e.while = (s32[]{:T(128)S(1)}, f32[1024,128]{1,0:T(8,128)}, f32[]{:T(128)S(1)}) while(%e.start), \
condition=%inner_condition, body=%inner_body, metadata={stack_frame_id=2}
  %e.changed = f32[1024,128]{1,0:T(8,128)} get-tuple-element(%e.while), index=1
  %e.sum = f32[]{:T(128)S(1)} get-tuple-element(%e.while), index=2
  ROOT %e.out = (s32[]{:T(128)S(1)}, f32[1024,128]{1,0:T(8,128)}, f32[]{:T(128)S(1)}) \
tuple(%e.next, %e.changed, %e.sum)
}

ENTRY %main (p.0: f32[1024,128], p.1: f32[]) -> f32[1024,128] {
  %p.0 = f32[1024,128]{1,0:T(8,128)} parameter(0)
  %p.1 = f32[]{:T(128)S(1)} parameter(1)
  %m.zero = s32[]{:T(128)S(1)} constant(0)
  %m.start = (s32[]{:T(128)S(1)}, f32[1024,128]{1,0:T(8,128)}, f32[]{:T(128)S(1)}) tuple(%m.zero, %p.0, %p.1)
  %m.while = (s32[]{:T(128)S(1)}, f32[1024,128]{1,0:T(8,128)}, f32[]{:T(128)S(1)}) while(%m.start), \
condition=%outer_condition, body=%outer_body
  ROOT %m.out = f32[1024,128]{1,0:T(8,128)} get-tuple-element(%m.while), index=1
}
"""
TABLE, ROWS = 1024 * 128 * 4, 8 * 128 * 4


def program(*lines: str, before: str = "") -> Module:
    """Parse a program whose entry computation has these instructions."""
    return parse(
        f"HloModule test\n\n{before}\nENTRY %main () -> f32[] {{\n" + "\n".join(f"  {x}" for x in lines) + "\n}\n"
    )
