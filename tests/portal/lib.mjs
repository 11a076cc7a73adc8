// The agent, the browser, and the checks of every page.
import { execFileSync, spawn } from "node:child_process";
import fs from "node:fs";
import { createRequire } from "node:module";
import os from "node:os";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";

// Debian 12's Node does not support import.meta.dirname.
const root = path.resolve(path.dirname(fileURLToPath(import.meta.url)), "../..");
const require = createRequire(path.join(root, ".cache/portal/package.json"));
const { chromium } = require("playwright-core");
const axe = fs.readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

export function expect(truth, what) {
    if (!truth) throw new Error(`wanted: ${what}`);
}

export async function until(what, look, seconds = 60) {
    const end = Date.now() + seconds * 1000;
    for (;;) {
        const found = await look();
        if (found) return found;
        if (Date.now() > end) throw new Error(`timeout: waited for ${what}`);
        await sleep(50);
    }
}

/** A host with devices, guests and an agent. */
export class Host {
    constructor(devices, domains) {
        this.dir = fs.mkdtempSync(path.join(os.tmpdir(), "virt-usb-portal-"));
        this.devices = devices;
        this.domains = domains;
        this.config = path.join(this.dir, "config.toml");
        fs.writeFileSync(
            this.config,
            [
                `state_dir = "${this.dir}/state"`,
                'api = "127.0.0.1:0"',
                "",
                "flap_limit = 0",
                'usb_white_list_switch = "on"',
                'usb_passthrough_whitelist = [{ vendor = "0529" }, ' +
                    '{ vendor = "0951", projects = ["crm-team"] }]',
            ].join("\n") + "\n",
        );
    }

    /** Write the simulated devices and guests. */
    show() {
        const value = v => (typeof v === "string" ? JSON.stringify(v) : v);
        const entry = kind => e =>
            `[[${kind}]]\n` +
            Object.entries(e)
                .map(([k, v]) => `${k} = ${value(v)}\n`)
                .join("");
        const file = path.join(this.dir, "sim.toml");
        fs.writeFileSync(
            `${file}.new`,
            [...this.devices.map(entry("device")), ...this.domains.map(entry("domain"))].join("\n"),
        );
        fs.renameSync(`${file}.new`, file);
        return file;
    }

    async start() {
        const log = path.join(this.dir, "agent.log");
        const out = fs.openSync(log, "a");
        this.agent = spawn(
            path.join(root, "target/release/virt-usbd"),
            ["--config", this.config, "--sim", this.show()],
            { stdio: ["ignore", out, out] },
        );
        this.url = await until(`the agent to be ready:\n${log}`, () => {
            const text = fs.readFileSync(log, "utf8");
            return text.includes("ready") && text.match(/served at (http:\/\/[^/]+)\//)?.[1];
        });
    }

    stop() {
        this.agent?.kill("SIGTERM");
        return this.agent && new Promise(done => this.agent.once("exit", done));
    }

    virtUsb(...args) {
        return execFileSync(
            path.join(root, "target/release/virt-usb"),
            ["--config", this.config, ...args],
            { encoding: "utf8" },
        );
    }

    /** Do what another user does meanwhile, through the API. */
    async act(token, server, action, request) {
        const answer = await fetch(`${this.url}/v3/servers/${server}/action`, {
            method: "POST",
            headers: { "content-type": "application/json", "x-auth-token": token },
            body: JSON.stringify({
                [`${action}_usb_devices`]: { usb_devices_requests: [request] },
            }),
        });
        expect(answer.status === 202, `${action} to be done: ${await answer.text()}`);
    }

    token(name, project, role) {
        return JSON.parse(
            this.virtUsb("--json", "token", "add", name, "--project", project, "--role", role),
        ).token;
    }
}

/** A user with a browser. */
export class User {
    static async at(browser, host, options = {}) {
        const user = new User();
        user.host = host;
        user.context = await browser.newContext({ baseURL: host.url, ...options });
        user.page = await user.context.newPage();
        user.trouble = [];
        user.page.on("console", said => {
            // The console also shows the status of a refused request: no error of the page.
            if (
                ["error", "warning"].includes(said.type()) &&
                !/status of [45]\d\d/.test(said.text())
            )
                user.trouble.push(said.text());
        });
        user.page.on("pageerror", error => user.trouble.push(String(error)));
        return user;
    }

    async signIn(token) {
        await this.page.goto("/");
        await this.page.getByLabel("Token").fill(token);
        await this.page.getByRole("button", { name: "Sign in" }).click();
    }

    /** The text of the page, without case and line breaks, which are style. */
    async text() {
        return (await this.page.locator("main").innerText()).replace(/[ \t]+/g, " ");
    }

    async sees(text, seconds = 60) {
        await until(
            `${JSON.stringify(text)} on ${this.page.url()}`,
            async () => (await this.text().catch(() => "")).includes(text),
            seconds,
        ).catch(async e => {
            throw new Error(`${e.message}; there is:\n${await this.text()}`);
        });
    }

    /** Check that the page has no accessibility violation, in light and dark mode, and no error. */
    async isSound() {
        for (const colorScheme of ["light", "dark"]) {
            await this.page.emulateMedia({ colorScheme });
            await this.page.evaluate(axe);
            const { violations } = await this.page.evaluate(() =>
                window.axe.run(document, { resultTypes: ["violations"] }),
            );
            const told = violations.map(
                v => `${v.id} (${v.help}): ${v.nodes.map(n => n.html).join(" ")}`,
            );
            expect(
                told.length === 0,
                `no barrier on ${this.page.url()} in ${colorScheme}, found:\n${told.join("\n")}`,
            );
        }
        expect(this.trouble.length === 0, `no trouble, found: ${this.trouble.join("\n")}`);
    }
}

export const launch = () =>
    chromium.launch({
        executablePath: "/usr/bin/chromium",
        args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
    });
