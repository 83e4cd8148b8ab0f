// Node's `test`; with LIST set, the names of the tests instead, which test_node.py collects.
import { test as run } from "node:test";

const list = (name) => console.log(JSON.stringify({ name }));
export const test = process.env.LIST ? list : run;
