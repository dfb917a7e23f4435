// Writes what zod makes of its types as JSON schemas: node zod.mjs > zod.json, with zod 4.6.7 and zod-to-json-schema 3.25.2.
import * as z from "zod";
import * as z3 from "zod/v3";
import { zodToJsonSchema } from "zod-to-json-schema";
function build(z, v4) {
  const s = {};
  s.strings = z.object({
    email: z.string().email(), url: z.string().url(), uuid: z.string().uuid(), cuid: z.string().cuid(), cuid2: z.string().cuid2(),
    ulid: z.string().ulid(), nanoid: z.string().nanoid(), emoji: z.string().emoji(), base64: z.string().base64(), datetime: z.string().datetime(), date: z.string().date(), time: z.string().time(),
    duration: z.string().duration(), ip: v4 ? z.ipv4() : z.string().ip(), starts: z.string().startsWith("a"), ends: z.string().endsWith("z"), includes: z.string().includes("q"), trimmed: z.string().trim().min(1).max(5), word: z.string().regex(/\bfoo\b/), jwt: v4 ? z.jwt() : z.string().jwt(),
  }).partial();
  s.numbers = z.object({ int: z.number().int(), positive: z.number().positive(), big: z.number().max(1e30), safe: v4 ? z.number().int() : z.number().safe(), step: z.number().multipleOf(0.5), finite: z.number().finite(), port: z.number().int().min(1).max(65535), lte: z.number().lte(-3.25), bigint: v4 ? z.literal(7) : z.bigint() });
  s.containers = z.object({ record: z.record(z.string(), z.number()), keyed: v4 ? z.partialRecord(z.enum(["a", "b"]), z.number()) : z.record(z.enum(["a", "b"]), z.number()), named: z.record(z.string().regex(/^k_/), z.boolean()), tuple: z.tuple([z.string(), z.number()]), rest: z.tuple([z.string()]).rest(z.number()), set: v4 ? z.array(z.string()) : z.set(z.string()), some: z.array(z.string()).min(1).max(3), map: v4 ? z.any() : z.map(z.string(), z.number()) }).partial();
  s.unions = z.object({ union: z.union([z.string(), z.number()]), overlapping: z.union([z.string(), z.string().min(3)]), discriminated: z.discriminatedUnion("kind", [z.object({ kind: z.literal("a"), x: z.number() }), z.object({ kind: z.literal("b"), y: z.string() })]), nullable: z.string().nullable(), optional: z.string().optional(), nullish: z.number().nullish(), literal: z.literal(null), native: z.nativeEnum({ A: "a", B: 2 }), never: z.never().optional(), any: z.any(), unknown: z.unknown(), both: z.object({ a: z.string() }).and(z.object({ b: z.number() })) });
  s.strictness = z.object({ strict: z.object({ a: z.string() }).strict(), loose: z.object({ a: z.string() }).passthrough(), caught: z.object({ a: z.string() }).catchall(z.number()), described: z.string().describe("words").default("d") });
  const node = z.lazy(() => z.object({ value: z.number(), children: z.array(node) }));
  s.recursive = node;
  const shared = z.object({ street: z.string() });
  s.shared = z.object({ home: shared, work: shared, pair: z.array(shared) });
  return s;
}
const out = {};
const three = build(z3, false);
for (const k in three) { out["zod3 " + k] = zodToJsonSchema(three[k]); out["zod3 named " + k] = zodToJsonSchema(three[k], "Named"); }
for (const k in three) out["zod3 openapi " + k] = zodToJsonSchema(three[k], { target: "openApi3" });
for (const k in three) { try { out["zod3 openai " + k] = zodToJsonSchema(three[k], { target: "openAi", $refStrategy: "root" }); } catch (e) { console.error(k, e.message); } }
let four; try { four = build(z, true); } catch (e) { console.error(e); }
for (const k in four) { for (const [n, o] of [["", {}], [" input", { io: "input" }], [" draft-7", { target: "draft-7" }], [" reused", { reused: "ref" }]]) { try { out["zod4" + n + " " + k] = z.toJSONSchema(four[k], { unrepresentable: "any", ...o }); } catch (e) { console.error(k, e.message); } } }
console.log(JSON.stringify(out));
