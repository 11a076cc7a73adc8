;; A filter by somebody else: whoever is named first comes first. It knows no devices, so it is of no use but to show that
;; the world of wit/ is all that a filter has to be, and, with a fault put in at a mark, what becomes of one that is broken.
;;
;; load counts lines, select lets the candidates through in their order, explain says that it does not know.
(module
  (import "[export]virt-usb:scheduler/inventory@0.1.0" "[resource-new]inventory" (func $new (param i32) (result i32)))
  (import "[export]virt-usb:scheduler/inventory@0.1.0" "[resource-new]prepared" (func $prepared (param i32) (result i32)))
  (memory (export "memory") 2)
  (data (i32.const 16) "it knows no devices")
  (data (i32.const 48) "stranger")
  (global $heap (mut i32) (i32.const 4096))
  (global $nodes (mut i32) (i32.const 0))

  ;; Takes memory and never gives it back: enough for a test.
  (func $alloc (export "cabi_realloc") (param $old i32) (param $size i32) (param $align i32) (param $want i32) (result i32)
    (local $at i32)
    (local.set $at (i32.and (i32.add (global.get $heap) (i32.const 7)) (i32.const -8)))
    (global.set $heap (i32.add (local.get $at) (local.get $want)))
    (block $enough
      (loop $grow
        (br_if $enough (i32.le_u (global.get $heap) (i32.shl (memory.size) (i32.const 16))))
        (br_if $grow (i32.ne (memory.grow (i32.const 16)) (i32.const -1)))
        (unreachable)))
    (local.get $at))
  (func $zeroed (param $size i32) (result i32)
    (local $at i32)
    (local.set $at (call $alloc (i32.const 0) (i32.const 0) (i32.const 8) (local.get $size)))
    (memory.fill (local.get $at) (i32.const 0) (local.get $size))
    (local.get $at))

  (func (export "virt-usb:scheduler/inventory@0.1.0#[constructor]inventory") (result i32)
    ;; @new
    (call $new (i32.const 1)))

  ;; load-report { nodes, devices, refused, problems }
  (func (export "virt-usb:scheduler/inventory@0.1.0#[method]inventory.load")
    (param $self i32) (param $lines i32) (param $len i32) (param $received i64) (result i32)
    (local $report i32) (local $end i32)
    (local.set $report (call $zeroed (i32.const 20)))
    ;; @load
    (local.set $end (i32.add (local.get $lines) (local.get $len)))
    (block $done
      (loop $next
        (br_if $done (i32.ge_u (local.get $lines) (local.get $end)))
        (if (i32.eq (i32.load8_u (local.get $lines)) (i32.const 10))
          (then (i32.store (local.get $report) (i32.add (i32.load (local.get $report)) (i32.const 1)))))
        (local.set $lines (i32.add (local.get $lines) (i32.const 1)))
        (br $next)))
    (global.set $nodes (i32.add (global.get $nodes) (i32.load (local.get $report))))
    (local.get $report))

  ;; result<selection { matched, placements }, refusal>: the payload is at 8
  (func $select (export "virt-usb:scheduler/inventory@0.1.0#[method]inventory.select")
    (param $self i32) (param $requests i32) (param i32) (param i32 i32 i32) (param i32 i64 i64) (param i32 i32)
    (param $some i32) (param $names i32) (param $count i32) (param $limit i32) (result i32)
    (local $answer i32) (local $placement i32)
    (local.set $answer (call $zeroed (i32.const 24)))
    ;; @select
    (i32.store offset=8 (local.get $answer) (local.get $count))
    (if (i32.gt_u (local.get $count) (local.get $limit)) (then (local.set $count (local.get $limit))))
    (local.set $placement (call $zeroed (i32.mul (local.get $count) (i32.const 12))))
    (i32.store offset=12 (local.get $answer) (local.get $placement))
    (i32.store offset=16 (local.get $answer) (local.get $count))
    (block $done
      (loop $next
        (br_if $done (i32.eqz (local.get $count)))
        (i64.store align=4 (local.get $placement) (i64.load align=4 (local.get $names)))
        (i32.store offset=8 (local.get $placement) (i32.const 7))
        (local.set $names (i32.add (local.get $names) (i32.const 8)))
        (local.set $placement (i32.add (local.get $placement) (i32.const 12)))
        (local.set $count (i32.sub (local.get $count) (i32.const 1)))
        (br $next)))
    (local.get $answer))

  ;; A rejection for a reason of its own, at the place of a verdict.
  (func $rejected (param $verdict i32)
    (i32.store8 (local.get $verdict) (i32.const 1))
    (i32.store8 offset=12 (local.get $verdict) (i32.const 6))
    (i32.store offset=16 (local.get $verdict) (i32.const 16))
    (i32.store offset=20 (local.get $verdict) (i32.const 19)))
  (func (export "virt-usb:scheduler/inventory@0.1.0#[method]inventory.explain")
    (param i32 i32 i32 i32 i32 i32 i32 i64 i64 i32 i32 i32 i32) (result i32)
    (local $answer i32)
    (local.set $answer (call $zeroed (i32.const 48)))
    ;; @explain
    (call $rejected (i32.add (local.get $answer) (i32.const 8)))
    (local.get $answer))
  (func (export "virt-usb:scheduler/inventory@0.1.0#[method]inventory.prepare")
    (param i32 i32 i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)
    (local $answer i32)
    (local.set $answer (call $zeroed (i32.const 24)))
    (i32.store offset=8 (local.get $answer) (call $prepared (i32.const 1)))
    (local.get $answer))
  (func (export "virt-usb:scheduler/inventory@0.1.0#[method]prepared.check") (param i32 i32 i32 i64) (result i32)
    (local $verdict i32)
    (local.set $verdict (call $zeroed (i32.const 40)))
    (call $rejected (local.get $verdict))
    (local.get $verdict))

  ;; statistics { revision, nodes, devices, available, keys }
  (func (export "virt-usb:scheduler/inventory@0.1.0#[method]inventory.statistics") (param i32) (result i32)
    (local $answer i32)
    (local.set $answer (call $zeroed (i32.const 40)))
    (i64.store offset=8 (local.get $answer) (i64.extend_i32_u (global.get $nodes)))
    (local.get $answer))
  (func (export "virt-usb:scheduler/inventory@0.1.0#[method]inventory.revision") (param i32) (result i64) (i64.const 0))
  (func (export "virt-usb:scheduler/inventory@0.1.0#[method]inventory.put")
    (param i32 i32 i32 i64 i32 i32 i64) (result i32) (call $zeroed (i32.const 24)))
  (func (export "virt-usb:scheduler/inventory@0.1.0#[method]inventory.remove") (param i32 i32 i32) (result i32) (i32.const 1))
  (func (export "virt-usb:scheduler/inventory@0.1.0#[method]inventory.touch") (param i32 i32 i32 i64) (result i32) (i32.const 1))
  (func (export "virt-usb:scheduler/inventory@0.1.0#[method]inventory.set-status")
    (param i32 i32 i32 i64 i32) (result i32) (call $zeroed (i32.const 24))))
