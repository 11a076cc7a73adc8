// The filter in a scheduler in JavaScript: jco makes a JavaScript module of the component.
//
//     jco transpile virt-usb-filter.wasm --name filter --instantiation async -o DIR
//     component.mjs DIR
//
// Each u64 (device ids, times, revisions) is a BigInt.

import assert from 'node:assert/strict'
import { readFile } from 'node:fs/promises'
import { resolve } from 'node:path'
import { pathToFileURL } from 'node:url'

const folder = pathToFileURL(resolve(process.argv[2]) + '/')
const { instantiate } = await import(new URL('filter.js', folder))

// A filter with its own memory. After a trap (WebAssembly.RuntimeError) it is unusable: create
// another one, and feed it again.
async function fresh() {
  const compile = async (file) => WebAssembly.compile(await readFile(new URL(file, folder)))
  const nothing = {}
  return instantiate(compile, nothing)
}

const { inventory: { Inventory }, text } = await fresh()

const NOON = 1_700_000_000_000n
const MINUTE = 60_000n
const PROJECT = '9a1f3c526c1b4c6e9b1c2b6c3a7d8e9f'

const key = { vendorId: 0x0529, productId: 0x0001, tags: [], count: 1 }
const twoKeys = question([{ ...key, count: 2 }])

function question(requests, rest = {}) {
  return { requests, weights: { spare: 4, reserve: 1 }, ...rest }
}

// The documents of the hosts. The last host has sent no update for ten minutes.
const published = await readFile(new URL('fleet.jsonl', import.meta.url), 'utf8')
const hosts = published.trimEnd().split('\n')

const fleet = new Inventory()
let report = fleet.load([...hosts.slice(0, 4), 'no document'].join('\n'), NOON)
assert.deepEqual([report.nodes, report.devices, report.refused], [4, 12, 1])
assert.equal(report.problems[0].line, 5)
report = fleet.load(hosts[4], NOON - 10n * MINUTE)
assert.deepEqual([report.nodes, report.devices, report.refused], [1, 2, 0])

say('Which hosts have a free licence key? The best is first: it has a spare key and little else.')
const { matched, placements } = fleet.select(question([key]), undefined, 10)
check(matched, 3)
check(
  placements.map(({ node, score }) => [node, score]),
  [['compute-5', 4], ['compute-1', 3], ['compute-2', -1]],
)

say('Which of three candidates have two? An unknown candidate cannot serve.')
check(names(fleet.select(twoKeys, ['compute-1', 'compute-2', 'elsewhere'], 10)), ['compute-1'])
check(names(fleet.select(twoKeys, [], 10)), [])

say('Why can the others not serve?')
const chosen = fleet.explain(twoKeys, 'compute-5')
check(
  [chosen.tag, chosen.val.score, [...chosen.val.devices]],
  ['accepted', 0, [5_000_001n, 5_000_002n]],
)
check(
  ['compute-2', 'compute-3', 'compute-4'].map((host) => reason(fleet.explain(twoKeys, host))),
  ['too-few-free', 'not-allowed', 'no-such-device'],
)
const { wanted, matching, allowed, free } = fleet.explain(twoKeys, 'compute-2').val
check([wanted, matching, allowed, free], [2, 2, 2, 1])

say('The keys of compute-3 are for one project.')
check(names(fleet.select({ ...twoKeys, project: PROJECT }, undefined, 1)), ['compute-3'])

say("Two keys and a device with the tag 'erp': on compute-1, only the keys have the tag.")
const tagged = question([...twoKeys.requests, { tags: ['erp'], count: 1 }])
check(reason(fleet.explain(tagged, 'compute-1')), 'contention')

say('Hosts without an update for two minutes are left out until their next update.')
const now = { ...twoKeys, moment: { now: NOON + MINUTE, maxAge: 2n * MINUTE } }
check(reason(fleet.explain(now, 'compute-5')), 'node-stale')
check(fleet.touch('compute-5', NOON + MINUTE), true)
check(names(fleet.select(now, undefined, 10)), ['compute-5', 'compute-1'])

say('The same as text: one string for many names. A node in WIT is a host in JSON.')
const asked = JSON.stringify({
  flavor: { usb_devices: [{ vendor_id: '0529', product_id: '0001', count: 2 }] },
})
check(text.selectNames(fleet, asked, 'compute-1\ncompute-2\nelsewhere', 10), 'compute-1')
check(text.selectNames(fleet, asked, '', 10), '')
check(
  JSON.parse(text.select(fleet, asked, undefined, 1)),
  { matched: 2, placements: [{ host: 'compute-5', score: 0 }] },
)
const lines = text.explain(fleet, asked, 'compute-2\nelsewhere').trimEnd().split('\n')
const verdicts = lines.map((line) => JSON.parse(line))
check(
  verdicts.map(({ host, verdict }) => [host, verdict.reason]),
  [['compute-2', 'too-few-free'], ['elsewhere', 'unknown-host']],
)

say('A guest takes a key of compute-1. A new document returns it. compute-5 leaves the fleet.')
check(fleet.setStatus('compute-1', 1_000_001n, 'claimed'), true)
check(text.setStatus(fleet, 'compute-1', 1_000_001n, 'claimed'), false)
check(names(fleet.select(twoKeys, undefined, 10)), ['compute-5'])
check(
  JSON.parse(text.load(fleet, hosts[0], NOON + MINUTE)),
  { hosts: 1, devices: 3, refused: 0, problems: [] },
)
check(fleet.remove('compute-5'), true)
check(fleet.remove('compute-5'), false)
check(names(fleet.select(twoKeys, undefined, 10)), ['compute-1'])

say('All hosts can serve a request without devices.')
check(
  names(fleet.select(question([]), ['compute-1', 'elsewhere'], 10)).sort(),
  ['compute-1', 'elsewhere'],
)

say('An invalid question is refused. That is no verdict, and changes nothing.')
const invalid = question([{ productId: 1, tags: [], count: 1 }])
refused('question', () => fleet.select(invalid, undefined, 10))
refused('unknown-device', () => fleet.setStatus('compute-1', 7n, 'claimed'))
refused('unknown-node', () => fleet.setStatus('elsewhere', 7n, 'claimed'))
assert.throws(
  () => text.selectNames(fleet, '{}', undefined, 10),
  ({ payload }) => typeof payload === 'string',
)
check(names(fleet.select(twoKeys, undefined, 10)), ['compute-1'])

fleet[Symbol.dispose]()

function names({ placements }) {
  return placements.map(({ node }) => node)
}

function reason({ tag, val }) {
  assert.equal(tag, 'rejected')
  return val.reason.tag
}

// jco throws WIT's errors, each with the error as its payload.
function refused(kind, call) {
  assert.throws(call, ({ payload }) => {
    console.log(`  refused: ${payload.tag}: ${payload.val}`)
    return payload.tag === kind
  })
}

function say(words) {
  console.log(`\n${words}`)
}

function check(found, expected) {
  console.log(' ', found)
  assert.deepEqual(found, expected)
}
