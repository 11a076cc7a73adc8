// The cases, which run one after the other.
import fs from "node:fs";
import path from "node:path";
import { Host, User, expect, launch, until } from "./lib.mjs";

const ERP = "11111111-2222-4333-8444-555555555555";
const CRM = "99999999-2222-4333-8444-555555555555";
const key = {
    vendor: "0529",
    product: "0001",
    bus: 1,
    device: 5,
    port: "1-1",
    speed: "full",
    serial: "HL-0001",
    manufacturer: "Aladdin",
    product_name: "HASP HL 3.25",
};
const devices = [
    key,
    {
        vendor: "0529",
        product: "0002",
        bus: 1,
        device: 6,
        port: "1-2",
        speed: "full",
        serial: "HL-0002",
        product_name: "<script>alert(1)</script>\"'&",
    },
    {
        vendor: "0951",
        product: "1666",
        bus: 2,
        device: 3,
        port: "2-1",
        speed: "super",
        serial: "E0D55E",
        product_name: "DataTraveler",
    },
    {
        vendor: "046d",
        product: "c31c",
        bus: 1,
        device: 7,
        port: "1-3",
        speed: "low",
        product_name: "Keyboard K120",
    },
];
const domains = [
    { name: "erp", uuid: ERP, project: "erp-team" },
    { name: "crm", uuid: CRM, project: "crm-team" },
    {
        name: "erp-test",
        uuid: "77777777-2222-4333-8444-555555555555",
        project: "erp-team",
        running: false,
    },
];

const cases = {
    async "a user attaches a key, sees that it is unplugged, reads why, and detaches it"({
        host,
        browser,
        tokens,
    }) {
        const user = await User.at(browser, host);
        await user.signIn(tokens.erp);
        await user.sees("2 devices, 2 available");
        await user.isSound();
        await user.page.getByLabel("Search").fill("hasp hl-0001");
        await user.page.getByRole("button", { name: "Show" }).click();
        await user.sees("HASP HL 3.25");
        expect(!(await user.text()).includes("HL-0002"), "the other device to be filtered out");
        await user.page.getByRole("link", { name: "Attach Aladdin HASP" }).click();
        await user.isSound();
        await user.page.getByLabel("Server").selectOption({ label: "erp" });
        await user.page.getByRole("button", { name: "Attach" }).click();
        await user.sees("erp has Aladdin HASP HL 3.25.");
        await user.isSound();
        const state = async wanted =>
            until(`the state ${wanted}`, async () =>
                (await user.page.locator(".state").allInnerTexts()).includes(wanted),
            );
        await user.page.getByRole("link", { name: "Back to server" }).click();
        await state("allocated");
        await user.isSound();
        // From here on, the page updates without the user.
        host.devices = devices.filter(d => d !== key);
        host.show();
        await state("removed");
        await until("the page to announce it", async () =>
            (await user.page.locator("#status").innerText()).includes("removed"),
        );
        await user.page.getByRole("link", { name: "Aladdin HASP HL 3.25", exact: true }).click();
        await state("removed");
        await user.isSound();
        host.devices = devices;
        host.show();
        await state("allocated");
        await user.page.getByRole("link", { name: "Detach Aladdin HASP" }).click();
        await user.sees("as an unplug");
        await user.isSound();
        await user.page.getByRole("button", { name: "Detach" }).click();
        await user.sees("erp released Aladdin HASP HL 3.25.");
        expect(!host.virtUsb("--json", "claims").includes(ERP), "nothing to be held");
    },

    async "a second user is refused, with the reason as far as the user may see it"({
        host,
        browser,
        tokens,
    }) {
        await host.act(tokens.boss, CRM, "attach", { id: 1 });
        const user = await User.at(browser, host);
        await user.signIn(tokens.erp);
        await user.page.goto("/portal/attach?device=1&server=" + ERP);
        await user.page.getByRole("button", { name: "Attach" }).click();
        await user.sees("is in use");
        await user.sees("Nothing was changed.");
        expect(!(await user.text()).includes("crm"), "the page not to name the holder");
        await user.isSound();
        const boss = await User.at(browser, host);
        await boss.signIn(tokens.boss);
        await boss.page.goto("/portal/attach?device=1&server=" + ERP);
        await boss.page.getByRole("button", { name: "Attach" }).click();
        await boss.sees("is held by instance " + CRM + " (crm) since");
        // Resources of other projects do not exist for the user.
        for (const place of [
            "/portal/servers/" + CRM,
            "/portal/devices/3",
            "/portal/devices/4",
            "/portal/servers/no",
        ]) {
            const answer = await user.page.goto(place);
            expect(answer.status() === 404, `${place} not to be found, found ${answer.status()}`);
            await user.isSound();
        }
        await host.act(tokens.boss, CRM, "detach", { id: 1 });
    },

    async "a stopped server gets the device at its next start, unless it is detached before"({
        host,
        browser,
        tokens,
    }) {
        const user = await User.at(browser, host);
        await user.signIn(tokens.erp);
        await user.page.getByRole("link", { name: "Servers" }).click();
        await user.isSound();
        await user.page.getByRole("link", { name: "erp-test" }).click();
        await user.page.getByRole("link", { name: "Attach device" }).click();
        await user.page.getByLabel("Device").selectOption("1");
        await user.page.getByRole("button", { name: "Attach" }).click();
        await user.sees("erp-test gets the device at its next start.");
        await user.page.getByRole("link", { name: "Back to server" }).click();
        await user.sees('{"id":1}');
        await user.isSound();
        await user.page.getByRole("link", { name: "Detach" }).click();
        await user.page.getByRole("button", { name: "Detach" }).click();
        await user.sees("erp-test no longer gets the device.");
    },

    async "an administrator creates a flavor from a device and disables the device"({
        host,
        browser,
        tokens,
    }) {
        const boss = await User.at(browser, host);
        await boss.signIn(tokens.boss);
        await boss.sees("4 devices");
        await boss.sees("not whitelisted");
        await boss.page.getByRole("link", { name: "Aladdin HASP HL 3.25", exact: true }).click();
        await boss.isSound();
        await boss.page.getByRole("link", { name: "Create flavor" }).click();
        await boss.page.getByLabel("Name").fill("erp.small");
        await boss.page.getByLabel(/only this device/).check();
        await boss.isSound();
        await boss.page.getByRole("button", { name: "Create" }).click();
        await boss.sees("erp.small");
        expect(host.virtUsb("flavor", "list", "--json").includes("HL-0001"), "the flavor to exist");
        await boss.isSound();
        await boss.page.getByRole("link", { name: "Remove erp.small" }).click();
        await boss.page.getByRole("button", { name: "Remove" }).click();
        await boss.sees("No flavors yet.");
        await boss.page.goto("/portal/devices/1");
        await boss.page.getByLabel("Reason").fill("it is lent");
        await boss.page.getByRole("button", { name: "Disable" }).click();
        await boss.sees("disabled");
        await boss.sees("it is lent");
        await boss.page.getByRole("button", { name: "Enable" }).click();
        await boss.sees("available");
        await boss.page.getByRole("link", { name: "Audit" }).click();
        await boss.sees("flavor-set");
        await boss.isSound();
    },

    async "the name of a device is shown as text"({ host, browser, tokens }) {
        const user = await User.at(browser, host);
        let asked = 0;
        user.page.on("dialog", dialog => {
            asked += 1;
            dialog.dismiss();
        });
        await user.signIn(tokens.erp);
        await user.sees("<script>alert(1)</script>");
        await user.page.goto("/portal/devices/2");
        await user.sees("<script>alert(1)</script>");
        await user.page.goto("/portal/?q=%22%3E%3Cscript%3Ealert(2)%3C/script%3E");
        await user.isSound();
        expect(asked === 0, "no script to run");
    },

    async "the portal works without scripts"({ host, browser, tokens }) {
        const user = await User.at(browser, host, { javaScriptEnabled: false });
        await user.signIn(tokens.erp);
        await user.page.getByRole("link", { name: "Attach Aladdin HASP" }).click();
        await user.page.getByLabel("Server").selectOption({ label: "erp" });
        await user.page.getByRole("button", { name: "Attach" }).click();
        await user.sees("erp has Aladdin HASP HL 3.25.");
        await user.page.getByRole("link", { name: "Back to server" }).click();
        await user.page.getByRole("link", { name: "Detach Aladdin HASP" }).click();
        await user.page.getByRole("button", { name: "Detach" }).click();
        await user.sees("erp released");
    },

    async "by keyboard alone"({ host, browser, tokens }) {
        const user = await User.at(browser, host);
        await user.page.goto("/portal/");
        // The field gets the focus with the first frame, which may be later than the page.
        await until("the token's field to have the focus", () =>
            user.page.evaluate(() => document.activeElement?.matches("input[name=token]")),
        );
        await user.page.keyboard.type(tokens.erp);
        await user.page.keyboard.press("Enter");
        await user.sees("Devices");
        await user.page.keyboard.press("Tab");
        expect(
            (await user.page.evaluate(() => document.activeElement.textContent)) ===
                "Skip to content",
            "the link past the menu to be first",
        );
        await user.page.keyboard.press("Enter");
        const reach = async name => {
            for (let n = 0; n < 40; n++) {
                await user.page.keyboard.press("Tab");
                const at = await user.page.evaluate(
                    () =>
                        document.activeElement.getAttribute("aria-label") ??
                        document.activeElement.textContent,
                );
                if (at.startsWith(name)) return;
            }
            throw new Error(`${name} is not reached`);
        };
        await reach("Attach Aladdin HASP");
        await user.page.keyboard.press("Enter");
        await user.page.waitForURL(/attach/);
        await reach("Attach");
        await user.page.keyboard.press("Enter");
        await user.sees("erp has");
        await host.act(tokens.boss, ERP, "detach", { id: 1 });
    },

    async "on a phone nothing is wider than the screen"({ host, browser, tokens }) {
        const user = await User.at(browser, host, {
            viewport: { width: 360, height: 740 },
            isMobile: true,
        });
        await user.signIn(tokens.erp);
        for (const place of [
            "/portal/",
            "/portal/servers",
            "/portal/servers/" + ERP,
            "/portal/devices/1",
            "/portal/attach?device=1",
            "/portal/flavors",
            "/portal/events",
        ]) {
            await user.page.goto(place);
            const width = await user.page.evaluate(() => document.documentElement.scrollWidth);
            expect(width <= 360, `${place} to be 360 wide, found ${width}`);
            await user.isSound();
        }
    },

    async "wrong, removed and forged credentials and requests of other sites are rejected"({
        host,
        browser,
        tokens,
    }) {
        const user = await User.at(browser, host);
        await user.signIn("vusb_wrong");
        await user.sees("Invalid or expired token");
        await user.isSound();
        await user.signIn(host.token("short", "erp-team", "member"));
        await user.sees("Devices");
        const csrf = await user.page.locator("input[name=csrf]").first().inputValue();
        const post = (place, form, headers = {}) =>
            user.context.request.post(place, { form, headers, maxRedirects: 0 });
        const form = { device: "1", server: ERP };
        const held = () => host.virtUsb("--json", "claims").includes(ERP);
        for (const [what, answer] of [
            ["no secret", await post("/portal/attach", form)],
            [
                "a wrong one",
                await post("/portal/attach", { ...form, csrf: csrf.replace(/./g, "0") }),
            ],
            [
                "another site",
                await post("/portal/attach", { ...form, csrf }, { origin: "http://evil.example" }),
            ],
            [
                "another site, by Sec-Fetch-Site",
                await post("/portal/attach", { ...form, csrf }, { "sec-fetch-site": "cross-site" }),
            ],
        ]) {
            expect(
                answer.status() === 403 && !held(),
                `${what} to be refused, found ${answer.status()}`,
            );
        }
        const asGet = await user.context.request.get(
            `/portal/attach?device=1&server=${ERP}&csrf=${csrf}`,
        );
        expect(asGet.status() === 200 && !held(), "a GET request to change nothing");
        const [cookie] = await user.context.cookies();
        expect(
            cookie.httpOnly && cookie.sameSite === "Strict",
            `a cookie that scripts and other sites do not get: ${JSON.stringify(cookie)}`,
        );
        const forged = await browser.newContext({ baseURL: host.url });
        for (const value of [
            cookie.value.replace(/^./, c => (c === "0" ? "1" : "0")),
            "",
            "x".repeat(9000),
            "%00",
        ]) {
            const answer = await forged.request.get("/portal/", {
                headers: { cookie: `virt-usb-portal=${value}` },
                maxRedirects: 0,
            });
            expect(
                answer.status() === 303 && answer.headers().location === "/portal/sign-in",
                `a forged cookie to be sent away, found ${answer.status()}`,
            );
        }
        const headers = (await user.context.request.get("/portal/")).headers();
        for (const part of ["default-src 'none'", "frame-ancestors 'none'", "form-action 'self'"]) {
            expect(headers["content-security-policy"].includes(part), part);
        }
        host.virtUsb("token", "remove", "short");
        await user.page.reload();
        expect(user.page.url().endsWith("/portal/sign-in"), "the session to end with its token");
        await user.signIn(tokens.erp);
        await user.page.getByRole("button", { name: "Sign out" }).click();
        await user.page.goto("/portal/servers");
        expect(user.page.url().endsWith("/portal/sign-in"), "the session to end");
    },
};

async function screenshot({ host, browser, tokens }) {
    const [key, , stick, keyboard] = devices;
    host.devices = [key, { ...key, device: 8, port: "1-4", serial: "HL-0007" }, stick, keyboard];
    host.show();
    await host.act(tokens.boss, ERP, "attach", { id: 1 });
    const boss = await User.at(browser, host, {
        viewport: { width: 1280, height: 500 },
        deviceScaleFactor: 1,
    });
    await boss.signIn(tokens.boss);
    await boss.sees("in use");
    await boss.sees("HL-0007");
    await boss.page.screenshot({
        path: path.resolve(import.meta.dirname, "../../docs/src/portal.png"),
    });
}

const host = new Host(devices, domains);
let browser,
    failed = 0;
try {
    await host.start();
    const tokens = {
        erp: host.token("anna", "erp-team", "member"),
        boss: host.token("olaf", "operations", "admin"),
    };
    browser = await launch();
    const wanted = Object.entries(cases).filter(
        ([name]) =>
            !process.argv[2] || process.argv[2].startsWith("--") || name.includes(process.argv[2]),
    );
    for (const [name, run] of wanted) {
        const begun = Date.now();
        host.devices = devices;
        host.show();
        try {
            await run({ host, browser, tokens });
            console.log(`ok - ${name} ${((Date.now() - begun) / 1000).toFixed(1)} s`);
        } catch (error) {
            failed += 1;
            console.log(`not ok - ${name}\n    ${error.message.replaceAll("\n", "\n    ")}`);
        }
        for (const context of browser.contexts()) await context.close();
    }
    if (process.argv.includes("--screenshot")) await screenshot({ host, browser, tokens });
    if (failed)
        console.log(
            fs
                .readFileSync(path.join(host.dir, "agent.log"), "utf8")
                .split("\n")
                .slice(-30)
                .join("\n"),
        );
} finally {
    await browser?.close();
    await host.stop();
    fs.rmSync(host.dir, { recursive: true, force: true });
}
process.exitCode = failed ? 1 : 0;
